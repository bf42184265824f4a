"""Features of images for the metrics: a small network for the digits that comes with the package,
or an Inception network from a file of the user's own.

Distances depend on the features, so every figure carries their name; that of a file is made of its
SHA-256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.checkpoints import read_pickled_tensors
from shared.images.pictures import Pictures

DIGITS = Path(__file__).parent / "pretrained" / "digit_features.safetensors"
Extract = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Features:
    """A named feature extractor.

    Args:
        name: stands in the name of every figure made with it.
        extract: uint8 [n, channels, height, width] -> features [n, k] and logits of classes
            [n, c] or None.
        colour: it takes three channels; grey images are repeated.
        shape: the only (height, width) it takes; None: any.
    """

    name: str
    extract: Extract
    colour: bool = True
    shape: tuple[int, int] | None = None
    batch: int = 128

    def __call__(self, pictures: np.ndarray | Pictures) -> tuple[np.ndarray, np.ndarray | None]:
        """Features and logits, float64, of uint8 ``pictures`` [n, height, width(, 3)].

        Raises:
            ValueError: pictures of a size or colour that the network does not take.
        """
        if self.shape not in (None, pictures.shape[1:3]) or (
            not self.colour and pictures.ndim == 4
        ):
            raise ValueError(
                f"features {self.name}: made for {'colour' if self.colour else 'grey'} images of "
                f"{self.shape}, not {list(pictures.shape[1:])}; give domain.features=FILE, an "
                "Inception network."
            )
        with torch.no_grad():
            parts = [self.extract(block) for block in self._blocks(pictures)]
        logits = [part for _, part in parts if part is not None]
        return (
            torch.cat([part for part, _ in parts]).double().numpy(),
            torch.cat(logits).double().numpy() if logits else None,
        )

    def _blocks(self, pictures: np.ndarray | Pictures) -> Iterator[Tensor]:
        for k in range(0, len(pictures), self.batch):
            block = torch.from_numpy(np.ascontiguousarray(pictures[k : k + self.batch]))
            block = block[:, None] if block.dim() == 3 else block.permute(0, 3, 1, 2)
            grey = self.colour and block.shape[1] == 1
            yield block.expand(-1, 3, -1, -1).contiguous() if grey else block.contiguous()


# -- digits -----------------------------------------------------------------------------------


class DigitNetwork(nn.Module):
    """A classifier of the 8 x 8 digits: 64 features of variance 1 on average, then logits.
    ``benchmarks/digit_features.py`` trains it on the training split."""

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(128, width),
            nn.SiLU(),
        )
        self.classify = nn.Linear(width, classes)
        self.deviation = nn.Buffer(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, 1, 8, 8] in [-1, 1] -> features [batch, 64], logits [batch, classes]."""
        features = self.convolutions(x)
        return features / self.deviation, self.classify(features)


@cache
def digit_network() -> DigitNetwork:
    """The network that comes with the package."""
    network = DigitNetwork()
    network.load_state_dict(load_file(DIGITS))
    return network.requires_grad_(False).eval()


def digits() -> Features:
    """Features of the 8 x 8 digits, offline."""
    network = digit_network()
    return Features("digits", lambda x: network(x.float() / 127.5 - 1.0), False, (8, 8))


# -- Inception --------------------------------------------------------------------------------


def inception(path: Path | str, sha256: str | None = None) -> Features:
    """The network in ``path``: TorchScript (NVIDIA's export of Inception, or any module that gives
    features [n, k], or features and logits, for uint8 [n, 3, height, width]), or the weights of
    the TensorFlow Inception of 2015-12-05, which torch-fidelity reads where it is installed.

    Args:
        sha256: what the hash of the file has to begin with. A name like ``...-6726825d.pth`` tells
            the beginning itself.

    Raises:
        FileNotFoundError: nothing there. ValueError: another hash, or no such network.
        ModuleNotFoundError: a weights file without torch-fidelity.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"domain.features: no file {path}.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    expected = sha256 or (named[1] if named else "")
    if not digest.startswith(expected.lower()):
        raise ValueError(
            f"domain.features: {path} has the SHA-256 {digest}, which does not begin with "
            f"{expected}; it is damaged or another file."
        )
    return Features(f"inception-{digest[:8]}", _scripted(path) or _weights(path))


def _scripted(path: Path) -> Extract | None:
    """What a TorchScript file computes; None for another kind of file."""
    try:
        module: Any = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except Exception:  # the reader raises several types
        return None
    arguments = {a.name for a in module.forward.schema.arguments}
    if "return_features" in arguments:  # NVIDIA's; its other output are probabilities
        return lambda x: (module(x, return_features=True), module(x).clamp(min=1e-38).log())
    return lambda x: found if isinstance(found := module(x), tuple) else (found, None)


def _weights(path: Path) -> Extract:
    try:
        reader = import_module("torch_fidelity.feature_extractor_inceptionv3")
        state = load_file(path) if path.suffix == ".safetensors" else read_pickled_tensors(path)
        with TemporaryDirectory() as folder:
            # torch-fidelity unpickles what it is given, so it is given tensors and nothing else
            torch.save(dict(state), clean := Path(folder) / "weights.pth")
            network = reader.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], str(clean)
            )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"domain.features: {path} is no TorchScript file; to read it as weights of Inception "
            "install torch-fidelity and torchvision (pip install 'molediff[images]'), or give a "
            "TorchScript file."
        ) from error
    except Exception as error:  # a foreign reader
        raise ValueError(f"domain.features: {path} is no Inception network ({error}).") from error

    def extract(x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = network(x)
        return features, logits

    return extract


def choose(name: str | None, sha256: str | None = None) -> Features | None:
    """'digits', a file as for :func:`inception`, or None."""
    if name is None:
        return None
    return digits() if name == "digits" else inception(name, sha256)
