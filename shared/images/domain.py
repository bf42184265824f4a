"""Images as a domain: the digits that come with scikit-learn, or arrays of the user's own."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from shared.configuration import reject_unknown
from shared.domains import Batch, Domain, Invalid
from shared.images import features, files
from shared.images.augment import Augmentation
from shared.images.data import open_pictures
from shared.images.features import Features
from shared.images.files import Picture
from shared.images.latents import Latents
from shared.images.pictures import Pictures
from shared.images.quality import frechet_distance, scores
from shared.images.records import Records, scaled
from shared.metrics import Estimate, proportion
from shared.process import State
from shared.randomness import stream
from shared.resampling import jackknife

REFERENCE = 50_000
"""Training images that samples are compared with, at most; the usual number for FID."""
PRINCIPAL = 200_000_000
"""Numbers in memory, at most, from which principal components are taken."""


class Images(Domain[Picture]):
    """Items are uint8 arrays, [height, width] or [height, width, 3]; the model sees
    [channels, height, width] scaled to [-1, 1].

    Args:
        data: 'digits' (1,797 grey images of 8 x 8 pixels, ten classes), a path or a name that
            :func:`shared.images.data.open_pictures` takes.
        size, label: of those pictures, as told there.
        validation: share of the images, drawn at random once for all, kept for validation where
            the data have no part for it.
        drop_label: how often training replaces the label by 'any class'.
        augment: the probability of each of EDM's transforms in training (0.12 there), or options
            of :class:`shared.images.augment.Augmentation`. A domain restored from a checkpoint
            gives its images as they are.
        autoencoder: a run of experiment=digits_vae or the like, or a folder of diffusers'
            AutoencoderKL: the model works on its latents, as large as they are on average 1.
        features: what images are compared by, as :func:`shared.images.features.choose` takes it:
            'digits' or a file with an Inception network; None: 'digits' for the digits.
        features_sha256: what the hash of that file has to begin with.
        upscale: the model is told the image ``upscale`` times smaller, and makes it larger (SR3,
            Saharia et al. 2021).

    Raises:
        FileNotFoundError, ValueError: the file is not there or holds something else.
        ModuleNotFoundError: a package that reads it is not installed.
    """

    name: ClassVar[str] = "images"

    def __init__(
        self,
        data: str = "digits",
        size: int | None = None,
        label: str | None = None,
        validation: float = 0.1,
        drop_label: float = 0.1,
        augment: Augmentation | Mapping[str, Any] | float | None = None,
        autoencoder: str | None = None,
        features: str | None = None,
        features_sha256: str | None = None,
        upscale: int | None = None,
    ) -> None:
        if not 0 < validation < 1 or not 0 <= drop_label <= 1:
            raise ValueError("images: needs 0 < validation < 1 and 0 <= drop_label <= 1.")
        self.data, self.size, self.label = data, size, label
        self.validation, self.drop_label = validation, drop_label
        if upscale is not None and upscale < 2:
            raise ValueError(f"images: upscale={upscale} must be at least 2, or null.")
        self.augmentation, self.autoencoder = Augmentation.of(augment), autoencoder
        if autoencoder is not None and (upscale is not None or self.augmentation is not None):
            raise ValueError("images: autoencoder goes with neither upscale nor augment.")
        self.features, self.features_sha256, self.upscale = features, features_sha256, upscale
        self._statistics: dict[str, Any] | None = None
        self._restored = False

    # -- constants ----------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        if self._statistics is None:
            labels = self.pictures.labels
            counts = [] if labels is None else np.bincount(labels).tolist()
            height, width, *rest = self.pictures.shape[1:]
            shape = [rest[0] if rest else 1, height, width]
            self._statistics = {"domain": self.name, "shape": shape, "class_counts": counts}
            if self.autoencoder is not None:
                self._statistics["latents"] = self._latents.statistics(self._training(1024)[:])
        return self._statistics

    def restore(self, statistics: Mapping[str, Any]) -> None:
        if statistics.get("domain") != self.name:
            raise ValueError(
                f"the checkpoint is of domain {statistics.get('domain')}, not images."
            )
        if ("latents" in statistics) != (self.autoencoder is not None):
            raise ValueError("images: domain.autoencoder goes with a model of latents.")
        self._statistics, self._restored = dict(statistics), True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of what the model sees."""
        channels, height, width = self.statistics().get("latents", self.statistics())["shape"]
        return channels, height, width

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of the images."""
        channels, height, width = self.statistics()["shape"]
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.statistics()["class_counts"])

    @property
    def augment_entries(self) -> int:
        """Length of the condition 'augment'; 0 without augmentation."""
        return 0 if self.augmentation is None else self.augmentation.entries

    # -- data ---------------------------------------------------------------------------------

    @cached_property
    def pictures(self) -> Pictures:
        """All images with their labels."""
        return open_pictures(self.data, self.size, self.label)

    @cached_property
    def held_out(self) -> np.ndarray:
        """True for validation images."""
        if self.pictures.held is not None:
            return self.pictures.held
        # in random order: neighbours are alike (the digits come writer by writer, 0 to 9 in turn)
        order = stream(0, 0, "images/split", 0).permutation(len(self.pictures))
        return order < self.validation * len(order)

    def _training(self, most: int) -> Pictures:
        """Training images, if there are more than ``most`` so many of them by chance."""
        rows = np.flatnonzero(~self.held_out)
        if len(rows) > most:
            order = stream(0, 0, "images/some", 0).permutation(len(rows))
            rows = np.sort(rows[order[:most]])
        return self.pictures.at(rows)

    @cached_property
    def _latents(self) -> Latents:
        assert self.autoencoder is not None
        return Latents(self.autoencoder)

    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        pictures, null = self.pictures, self.classes
        read: Callable[[int], Tensor] = partial(_pixels, pictures)
        if self.autoencoder is not None:
            constants = self.statistics()["latents"]
            read = self._latents.reader(self.data, pictures, constants)
        train, held = np.flatnonzero(~self.held_out), np.flatnonzero(self.held_out)
        augment = None if self._restored else self.augmentation
        return (
            Records(read, train, pictures.labels, self.drop_label, null, augment),
            Records(read, held, pictures.labels, null=null),
        )

    def encode(self, images: np.ndarray) -> Tensor:
        """Items [n, height, width(, 3)] -> model units, float32 [n, channels, height, width]."""
        if self.autoencoder is None:
            return scaled(images)
        return self._latents.encode(images, self.statistics()["latents"])

    def training(self, most: int) -> tuple[Tensor, Tensor]:
        """Up to ``most`` training images in model units, and their classes.

        Raises:
            ValueError: data without classes.
        """
        labels = self.pictures.labels
        if labels is None:
            raise ValueError("images: these data have no classes.")
        rows = np.flatnonzero(~self.held_out)[:most]
        return self.encode(self.pictures[rows]), torch.from_numpy(labels[rows])

    def collate(self, records: Sequence[Any]) -> Batch:
        columns = {name: torch.stack([r[name] for r in records]) for name in records[0]}
        x = columns.pop("x")
        if self.upscale is not None:
            columns["low"] = enlarged(functional.avg_pool2d(x, self.upscale), self.upscale)
        return Batch({"x": x}, cond=columns)

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
        return {"low": enlarged(scaled(chosen), self.upscale)}

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
        x = state["x"].detach().float()
        if self.autoencoder is not None:
            x = self._latents.decode(x, self.statistics()["latents"])
        pixels = ((x + 1.0) * 127.5).permute(0, 2, 3, 1)
        good = torch.isfinite(pixels).flatten(1).all(1)
        whole = pixels.nan_to_num().round().clamp(0, 255).to(torch.uint8).numpy()
        if self.picture_shape[0] == 1:
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
        return files.read(path, self.picture_shape[1:])

    def write(self, path: Path, items: Iterable[Picture]) -> None:
        files.write(path, list(items), self.picture_shape[1:])

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

        def distance(these: np.ndarray, those: np.ndarray) -> Estimate:
            points, centre = ((self._flat(v) - mean) @ axes for v in (these, those))
            return jackknife(lambda p: frechet_distance(p, centre), points)

        name, made = f"frechet_pca{axes.shape[1]}", np.stack(pictures)
        truth = self._principal if reference is None else np.stack(reference)
        out[name] = distance(made, truth)
        if reference is None:
            rows = np.flatnonzero(self.held_out)[: len(pictures)]
            out[f"{name}_of_validation"] = distance(self.pictures[rows], truth)
        if (chosen := self._features) is not None:
            against = "train" if reference is None else "given"
            others = self._training(REFERENCE) if reference is None else truth
            out |= scores(chosen, made, others, against)
        return out

    @cached_property
    def _features(self) -> Features | None:
        default = "digits" if self.data == "digits" else None
        return features.choose(self.features or default, self.features_sha256)

    def _flat(self, images: np.ndarray) -> np.ndarray:
        return scaled(images).flatten(1).numpy().astype(np.float64)

    @cached_property
    def _principal(self) -> np.ndarray:
        """Training images, as many as memory has room for."""
        return self._training(max(256, PRINCIPAL // math.prod(self.picture_shape)))[:]

    @cached_property
    def _components(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [d] and principal axes [d, k] of the training split."""
        train = self._flat(self._principal)
        mean = train.mean(0)
        _, _, axes = np.linalg.svd(train - mean, full_matrices=False)
        return mean, axes[:32].T

    def view(self, items: Sequence[Picture]) -> str:
        """The first 100 images as one embedded PNG."""
        if not len(items):
            return "<p>No images.</p>"
        zoom = max(1, 40 // max(self.picture_shape[1:]))
        tiles = np.stack(items[:100])
        edges = [(0, 0), (0, 1), (0, 1), *[(0, 0)] * (tiles.ndim - 3)]
        framed = np.pad(tiles, edges, constant_values=96)
        data = files.png(framed, columns=min(len(items), 10), zoom=zoom)
        text = base64.b64encode(data).decode()
        return f'<img alt="{min(len(items), 100)} images" src="data:image/png;base64,{text}">'


def _pixels(pictures: Pictures, row: int) -> Tensor:
    return scaled(pictures[row][None])[0]


def enlarged(small: Tensor, factor: int) -> Tensor:
    """Images [batch, channels, height, width] with sides ``factor`` times as long."""
    return functional.interpolate(small, scale_factor=float(factor), mode="bicubic")
