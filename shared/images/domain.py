"""Images as a domain: the digits that come with scikit-learn, or arrays of the user's own."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from shared.configuration import reject_unknown
from shared.domains import Batch, Domain, Invalid
from shared.images import features, files
from shared.images.data import load
from shared.images.features import Features
from shared.images.files import Picture
from shared.images.quality import frechet_distance, scores
from shared.metrics import Estimate, proportion
from shared.process import State
from shared.randomness import stream
from shared.resampling import jackknife


class Labelled(Dataset[tuple[Tensor, Tensor]]):
    """Images with labels, each replaced by ``null`` with probability ``drop`` (by torch's
    generator, which training sets for every record)."""

    def __init__(self, pixels: Tensor, labels: Tensor, drop: float, null: int) -> None:
        self.pixels, self.labels, self.drop = pixels, labels, drop
        self.null = torch.tensor(null)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        dropped = self.drop > 0 and float(torch.rand(())) < self.drop
        return self.pixels[index], self.null if dropped else self.labels[index]


class Images(Domain[Picture]):
    """Items are uint8 arrays, [height, width] or [height, width, 3]; the model sees
    [channels, height, width] scaled to [-1, 1].

    Args:
        data: 'digits' (1,797 grey images of 8 x 8 pixels, ten classes) or a path that
            :func:`shared.images.data.load` takes: an .npz, CIFAR-10's batches, a folder.
        validation: share of the images, drawn at random once for all, kept for validation.
        drop_label: how often training replaces the label by 'any class'.
        features: what images are compared by, as :func:`shared.images.features.choose` takes it:
            'digits' or a file with an Inception network; None: 'digits' for the digits.
        features_sha256: what the hash of that file has to begin with.
        upscale: the model is told the image ``upscale`` times smaller, and makes it larger (SR3,
            Saharia et al. 2021).

    Raises:
        FileNotFoundError, ValueError: the file is not there or holds something else.
    """

    name: ClassVar[str] = "images"

    def __init__(
        self,
        data: str = "digits",
        validation: float = 0.1,
        drop_label: float = 0.1,
        features: str | None = None,
        features_sha256: str | None = None,
        upscale: int | None = None,
    ) -> None:
        if not 0 < validation < 1 or not 0 <= drop_label <= 1:
            raise ValueError("images: needs 0 < validation < 1 and 0 <= drop_label <= 1.")
        self.data, self.validation, self.drop_label = data, validation, drop_label
        if upscale is not None and upscale < 2:
            raise ValueError(f"images: upscale={upscale} must be at least 2, or null.")
        self.features, self.features_sha256, self.upscale = features, features_sha256, upscale
        self._statistics: dict[str, Any] | None = None

    # -- constants ----------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        if self._statistics is None:
            images, labels = self._arrays
            counts = [] if labels is None else np.bincount(labels).tolist()
            height, width, *rest = images.shape[1:]
            shape = [rest[0] if rest else 1, height, width]
            self._statistics = {"domain": self.name, "shape": shape, "class_counts": counts}
        return self._statistics

    def restore(self, statistics: Mapping[str, Any]) -> None:
        if statistics.get("domain") != self.name:
            raise ValueError(
                f"the checkpoint is of domain {statistics.get('domain')}, not images."
            )
        self._statistics = dict(statistics)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.statistics()["shape"]
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.statistics()["class_counts"])

    # -- data ---------------------------------------------------------------------------------

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        if self.data == "digits":
            from sklearn.datasets import load_digits  # slow to import

            images, labels = load_digits(return_X_y=True)
            grey = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
            return grey, labels.astype(np.int64)
        return load(Path(self.data))

    @cached_property
    def _held_out(self) -> np.ndarray:
        # in random order: neighbours are alike (the digits come writer by writer, 0 to 9 in turn)
        order = stream(0, 0, "images/split", 0).permutation(len(self._arrays[0]))
        return order < self.validation * len(order)

    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        images, labels = self._arrays
        held = torch.from_numpy(self._held_out)
        pixels = self.encode(images)
        if labels is None:
            return TensorDataset(pixels[~held]), TensorDataset(pixels[held])
        kinds, drop = torch.from_numpy(labels), self.drop_label
        train = Labelled(pixels[~held], kinds[~held], drop, self.classes)
        return train, Labelled(pixels[held], kinds[held], 0.0, self.classes)

    def encode(self, images: np.ndarray) -> Tensor:
        """Items [n, height, width(, 3)] -> model units, float32 [n, channels, height, width]."""
        pixels = torch.from_numpy(images.astype(np.float32)) / 127.5 - 1.0
        return pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()

    def training(self, most: int) -> tuple[Tensor, Tensor]:
        """Up to ``most`` training images in model units, and their classes.

        Raises:
            ValueError: data without classes.
        """
        images, labels = self._arrays
        if labels is None:
            raise ValueError("images: these data have no classes.")
        rows = np.flatnonzero(~self._held_out)[:most]
        return self.encode(images[rows]), torch.from_numpy(labels[rows])

    def collate(self, records: Sequence[Any]) -> Batch:
        columns = [torch.stack(column) for column in zip(*records, strict=True)]
        cond = {"label": columns[1]} if len(columns) > 1 else {}
        if self.upscale is not None:
            cond["low"] = enlarged(functional.avg_pool2d(columns[0], self.upscale), self.upscale)
        return Batch({"x": columns[0]}, cond=cond)

    def null_condition(self) -> dict[str, Tensor]:
        return {"label": torch.tensor([self.classes])} if self.classes else {}

    def variance_head(self) -> nn.Module:
        from shared.images.networks import VarianceNetwork  # it imports this module

        channels, height, width = self.shape
        even = height % 2 == 0 and width % 2 == 0
        return VarianceNetwork(channels, (16, 32) if even else (16,), self.classes)

    # -- samples ------------------------------------------------------------------------------

    def template(self, seed: int, indices: Sequence[int], **request: Any) -> Batch:
        """``label``: a class, or 'any' for the model without condition; by default every sample
        draws its own class with the frequency that it has in the data. ``low``: a file of small
        images, for a model that enlarges; sample i takes the i-th, over and over."""
        reject_unknown("images, request", request, ("label", "low"))
        state = {"x": torch.zeros(len(indices), *self.shape)}
        cond = self._low(request.get("low"), indices)
        if self.classes:
            labels = [self._label(request.get("label"), seed, i) for i in indices]
            cond["label"] = torch.tensor(labels, dtype=torch.long)
        elif request.get("label") is not None:
            raise ValueError("images, request: label is given, but the data have no classes.")
        return Batch(state, cond=cond)

    def _low(self, path: Any, indices: Sequence[int]) -> dict[str, Tensor]:
        if (path is None) != (self.upscale is None):
            raise ValueError(
                "images, request: low=FILE of small images goes with a model that enlarges, and "
                "only with one (domain.upscale)."
            )
        if self.upscale is None:
            return {}
        channels, height, width = self.shape
        small = (height // self.upscale, width // self.upscale)
        found = [p for p in files.read(Path(path), small) if not isinstance(p, Invalid)]
        if not found or any((1 if p.ndim == 2 else p.shape[2]) != channels for p in found):
            raise ValueError(
                f"images, request: low={path} holds no images of {small[0]} x {small[1]} with "
                f"{channels} channels."
            )
        chosen = np.stack([found[i % len(found)] for i in indices])
        return {"low": enlarged(self.encode(chosen), self.upscale)}

    def _label(self, label: Any, seed: int, index: int) -> int:
        if label == "any":
            return self.classes
        if label is None:
            counts = np.array(self.statistics()["class_counts"], dtype=np.float64)
            draw = stream(seed, index, "template", 0).random()
            return int(np.searchsorted(counts.cumsum() / counts.sum(), draw, side="right"))
        if not isinstance(label, int) or not 0 <= label < self.classes:
            raise ValueError(
                f"images, request: label={label} is not a class; give 0 to {self.classes - 1} or "
                "'any'."
            )
        return label

    def decode(self, state: State, mask: Tensor | None) -> list[Picture | Invalid]:
        pixels = ((state["x"].detach().float() + 1.0) * 127.5).permute(0, 2, 3, 1)
        good = torch.isfinite(pixels).flatten(1).all(1)
        whole = pixels.nan_to_num().round().clamp(0, 255).to(torch.uint8).numpy()
        if self.shape[0] == 1:
            whole = whole[..., 0]
        return [
            picture if fine else Invalid(str(i), "pixels that are not finite")
            for i, (picture, fine) in enumerate(zip(whole, good.tolist(), strict=True))
        ]

    # -- files --------------------------------------------------------------------------------

    @property
    def suffix(self) -> str:
        return ".npy"

    def read(self, path: Path) -> Iterator[Picture | Invalid]:
        return files.read(path, self.shape[1:])

    def write(self, path: Path, items: Iterable[Picture]) -> None:
        files.write(path, list(items), self.shape[1:])

    # -- judging ------------------------------------------------------------------------------

    def metrics(
        self, items: Sequence[Picture | Invalid], reference: Sequence[Picture] | None = None
    ) -> dict[str, Estimate]:
        """Share of valid images; the scores of :mod:`shared.images.quality` if there are features;
        and the Frechet distance between Gaussians fitted to the first principal components of the
        training images (32, or fewer). The reference is the training split unless given. Distances
        fall with more samples, so compare at equal n only: beside that of principal components
        stands that of as many validation images, or of all if there are fewer."""
        pictures = [item for item in items if not isinstance(item, Invalid)]
        out = {"valid": proportion(len(pictures), len(items))}
        if len(pictures) < 2:
            return out
        mean, axes = self._components
        images, held = self._arrays[0], self._held_out

        def distance(these: np.ndarray, those: np.ndarray) -> Estimate:
            points, centre = ((self._flat(v) - mean) @ axes for v in (these, those))
            return jackknife(lambda p: frechet_distance(p, centre), points)

        name = f"frechet_pca{axes.shape[1]}"
        truth = images[~held] if reference is None else np.stack(reference)
        out[name] = distance(np.stack(pictures), truth)
        if reference is None:
            out[f"{name}_of_validation"] = distance(images[held][: len(pictures)], truth)
        if (chosen := self._features) is not None:
            against = "train" if reference is None else "given"
            out |= scores(chosen, np.stack(pictures), truth, against)
        return out

    @cached_property
    def _features(self) -> Features | None:
        default = "digits" if self.data == "digits" else None
        return features.choose(self.features or default, self.features_sha256)

    def _flat(self, images: np.ndarray) -> np.ndarray:
        return self.encode(images).flatten(1).numpy().astype(np.float64)

    @cached_property
    def _components(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [d] and principal axes [d, k] of the training split."""
        train = self._flat(self._arrays[0][~self._held_out])
        mean = train.mean(0)
        _, _, axes = np.linalg.svd(train - mean, full_matrices=False)
        return mean, axes[:32].T

    def view(self, items: Sequence[Picture]) -> str:
        """The first 100 images as one embedded PNG."""
        if not len(items):
            return "<p>No images.</p>"
        zoom = max(1, 40 // max(self.shape[1:]))
        tiles = np.stack(items[:100])
        edges = [(0, 0), (0, 1), (0, 1), *[(0, 0)] * (tiles.ndim - 3)]
        framed = np.pad(tiles, edges, constant_values=96)
        data = files.png(framed, columns=min(len(items), 10), zoom=zoom)
        text = base64.b64encode(data).decode()
        return f'<img alt="{min(len(items), 100)} images" src="data:image/png;base64,{text}">'


def enlarged(small: Tensor, factor: int) -> Tensor:
    """Images [batch, channels, height, width] with sides ``factor`` times as long."""
    return functional.interpolate(small, scale_factor=float(factor), mode="bicubic")
