"""Energies of molecules in 3D: what steers sampling, as :class:`shared.guidance.Energy`.

At the noisy state, with a network that knows about noise (``Term(energy, at="input")``):
:func:`property_energy` and :func:`fingerprint_energy`. At the estimate of the clean molecule
(``Term(energy, at="estimate")``): :class:`Composition` and :class:`UserEnergy`. Sums, multiples
and :class:`shared.guidance.AnyOf` combine them.

Two forms of guidance. As published (EEGSDE, Bao et al. 2023, and its code) a reverse step from t
to s subtracts l sigma^2_{t|s} / alpha_{t|s} grad E from its mean, with E = (g(z_t, t) - c)^2 in
standardised units, the gradient by the whole of z_t = [x, h], that of x with its mean removed, no
clipping, and c read once for the batch. :class:`shared.guidance.Guided` is the same in an
ancestral step with scale = l (compared with the published step in the tests), and differs where
that is wrong or narrow: targets are those of each molecule, gradients are projected in every
field (padding stays zero), any solver may be used, and gradients may be clipped or limited to a
range of noise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from molediff.molecules import SYMBOLS, Molecule, atomic_number
from molediff.own import load_function
from molediff.targets import Extreme, Properties, Range, Target, Value
from shared.configuration import ConfigurationError
from shared.guidance import Energy, SquaredError, Within
from shared.guidance.energies import Predict, Time
from shared.predictions import Condition
from shared.process import State

# -- properties -------------------------------------------------------------------------------


def property_energy(
    predict: Predict, properties: Properties, column: int, target: Target | str
) -> Energy:
    """What drives a predicted property to its target, in units of the mean absolute deviation of
    the training data: (y - c)^2 for a value, the squared distance to a range, a line for max and
    min that ends at the best value of the training data.

    Args:
        predict: (x, t, mask, cond) -> standardised properties [batch, k].
        properties: unit, mean, mad, min and max of the training data, as domains store them.
        column: which of the k. target: in the property's unit; or the name of a condition with a
            standardised value for each molecule [batch].
    """

    def chosen(x: State, t: Time, mask: Tensor | None, cond: Condition | None) -> Tensor:
        return predict(x, t, mask, cond)[:, column]

    if isinstance(target, str):
        return SquaredError(chosen, target, name=target)
    row, name = properties[target.name], str(target)

    def standard(value: float) -> float:
        return (value - float(row["mean"])) / float(row["mad"])

    if isinstance(target, Value):
        return SquaredError(chosen, standard(target.value), name=name)
    if isinstance(target, Range):
        return Within(chosen, standard(target.low), standard(target.high), name)
    assert isinstance(target, Extreme)
    best = float(row["max"] if target.maximise else row["min"])
    return Slope(chosen, standard(best), target.maximise, name)


@dataclass(frozen=True, eq=False)
class Slope(Energy):
    """The distance of a predicted property [batch] to a ``bound`` that it is to reach from below
    (``rising``) or from above; a constant pull, zero beyond, where a predictor is not to be
    trusted."""

    predict: Predict
    bound: float
    rising: bool = True
    name: str = "slope"

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        distance = self.bound - self.predict(x, t, mask, cond)
        return F.relu(distance if self.rising else -distance)


def fingerprint_energy(predict: Predict, bits: np.ndarray | str) -> Energy:
    """sum over bits of (sigmoid(logit) - bit)^2 (EEGSDE, Sec. 5.3): similarity to a molecule.

    ``predict``: (x, t, mask, cond) -> logits [batch, n]; ``bits`` [n] of
    :func:`molediff.fingerprints.fingerprint`, of the kind that the predictor was trained on, or
    the name of a condition with the bits of each molecule [batch, n].
    """

    def probability(x: State, t: Time, mask: Tensor | None, cond: Condition | None) -> Tensor:
        return predict(x, t, mask, cond).sigmoid()

    target = bits if isinstance(bits, str) else torch.from_numpy(bits.astype(np.float32))
    return SquaredError(probability, target, name="fingerprint")


# -- composition ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Composition(Energy):
    """Squared distance of the expected numbers of atoms of each element to their ranges; evaluate
    it at the estimate of x_0.

    Args:
        limits: atomic number -> (least, most), infinite where open.
        elements: atomic numbers of the columns of 'types'. scale: value of a set entry.
    """

    limits: Mapping[int, tuple[float, float]]
    elements: Sequence[int]
    scale: float
    name: str = "composition"

    @classmethod
    def parse(cls, words: Sequence[str], elements: Sequence[int], scale: float) -> Composition:
        """Limits from words such as ``C=6``, ``N<=1``, ``O>0``, ``C=4..6`` and ``F=0``.

        Raises:
            ConfigurationError: a word that cannot be read, an element that the model does not
                know, or limits that contradict each other; one line.
        """
        limits: dict[int, tuple[float, float]] = {}
        for word in words:
            z, low, high = _limit(word)
            if z not in elements:
                known = ", ".join(SYMBOLS[e] for e in elements)
                raise ConfigurationError(f"composition '{word}': the model makes only {known}.")
            before = limits.get(z, (0.0, math.inf))
            limits[z] = max(low, before[0]), min(high, before[1])
            if limits[z][0] > limits[z][1]:
                raise ConfigurationError(
                    f"composition '{word}': no number of {SYMBOLS[z]} atoms is left."
                )
        return cls(limits, elements, scale)

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        counts = probabilities(x["types"], self.scale, mask).sum(1)
        ends = [self.limits.get(z, (-math.inf, math.inf)) for z in self.elements]
        low, high = torch.tensor(ends).to(counts).T
        return (F.relu(low - counts) + F.relu(counts - high)).square().sum(1)

    def error(self, molecule: Molecule) -> int:
        """By how many atoms a finished molecule misses the limits."""
        found = {z: int((molecule.atomic_numbers == z).sum()) for z in self.limits}
        return int(sum(max(a - found[z], found[z] - b, 0) for z, (a, b) in self.limits.items()))


def probabilities(types: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Estimates of 'types' [b, n, K] as shares of the elements, zero in the padding."""
    shares = types / scale
    return shares if mask is None else shares * mask[..., None].to(shares)


_LIMIT = re.compile(r"\s*([A-Za-z]{1,2})\s*(<=|>=|<|>|=)\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?")


def _limit(word: str) -> tuple[int, float, float]:
    match = _LIMIT.fullmatch(word)
    if match is None or (match[4] and match[2] != "="):
        raise ConfigurationError(
            f"composition '{word}' cannot be read: write C=6, N<=1, O>0 or C=4..6."
        )
    try:
        z = atomic_number(match[1])
    except ValueError as error:
        raise ConfigurationError(f"composition '{word}': {error}.") from None
    n = float(match[3])
    ends = {"=": (n, float(match[4] or n)), "<=": (0.0, n), ">=": (n, math.inf)}
    low, high = (ends | {"<": (0.0, n - 1.0), ">": (n + 1.0, math.inf)})[match[2]]
    if low > high:
        raise ConfigurationError(f"composition '{word}' allows no number of atoms.")
    return z, low, high


# -- the user's own ---------------------------------------------------------------------------

UserFunction = Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class UserEnergy(Energy):
    """A function of one Python file as an energy at the estimate of x_0, low where molecules
    should go. For example ``flat.py``::

        def flat(positions, elements, mask):
            spread = positions.transpose(1, 2) @ positions / mask.sum(1)[:, None, None]
            return torch.linalg.eigvalsh(spread)[:, 0]  # thin along one direction

    The function gets ``positions`` [batch, n, 3] in Angstrom, centred, zero in the padding;
    ``elements``, symbol -> share of that element in every atom [batch, n], which add up to 1;
    ``mask`` [batch, n], True for real atoms. It returns one value per molecule [batch], made of
    them with torch, so that it has a gradient.

    Raises (on call):
        ValueError: something other than a tensor of one value per molecule, or an error inside
            the function, with its name (a RuntimeError stays one).
    """

    function: UserFunction
    elements: Sequence[int]
    scale: float
    name: str = "own energy"

    @classmethod
    def load(cls, text: str, elements: Sequence[int], scale: float) -> UserEnergy:
        """The function that ``path.py:function`` names; see ``molediff.own``."""
        return cls(load_function(text, "own energy"), elements, scale, text)

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        shares = probabilities(x["types"], self.scale, mask)
        named = {SYMBOLS[z]: shares[..., k] for k, z in enumerate(self.elements)}
        real = torch.ones_like(shares[..., 0], dtype=torch.bool) if mask is None else mask
        try:
            value = self.function(x["positions"], named, real)
        except RuntimeError as error:  # of torch; also how it tells that memory ran out
            raise RuntimeError(f"energy '{self.name}': {error}") from error
        except Exception as error:
            raise ValueError(
                f"energy '{self.name}' fails: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.shape != (len(shares),):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"energy '{self.name}' returns {found}: return a tensor with one value per "
                f"molecule, ({len(shares)},)."
            )
        return value
