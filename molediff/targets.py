"""What a user wants of a property, in words: ``gap=5.0``, ``gap=5.0eV``, ``gap>=5 eV``,
``mu=2.0..3.0``, ``2 < mu < 3``, ``homo=max``.

A target knows how far values are from it, what to tell a conditional model, and whether the
training data hold anything like it.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import truncnorm

from shared.configuration import ConfigurationError
from shared.randomness import stream

Properties = Mapping[str, Mapping[str, Any]]
"""Property -> unit, mean, mad, min and max over the training data, as domains store them."""

TAIL = 4.0
"""Farther from the mean than so many standard deviations a target counts as outlying."""

BEST = 1.6448536269514722
"""Upper 5 % point of the normal: what 'max' asks of a conditional model."""


@dataclass(frozen=True)
class Target(ABC):
    """A wish for the property ``name``, in its ``unit`` (that of the training data)."""

    name: str
    unit: str

    @staticmethod
    def parse(text: str, properties: Properties) -> Target:
        """The target that ``text`` describes; names and units in any case.

        Raises:
            ConfigurationError: an unknown property, a unit that does not fit it, or a number or
                range that cannot be read; one line.
        """
        return _parse(text, properties)

    @abstractmethod
    def interval(self, properties: Properties) -> tuple[float, float]:
        """Where the property is to lie; infinite where open."""

    @abstractmethod
    def error(self, values: Any) -> np.ndarray:
        """Distance of ``values`` [...] to the target, 0 inside a range; NaN where there is none
        (max, min) and for values that are NaN."""

    def draw(self, properties: Properties, seed: int, indices: Sequence[int]) -> np.ndarray:
        """What to tell a conditional model for samples ``indices`` of ``seed``, float64 [b].

        A range with two ends gives a uniform draw from it, an open one (an inequality, max, min)
        a draw from the normal of the training data restricted to it; both are kept inside the
        training data where they overlap it.
        """
        u = [stream(seed, i, f"target/{self.name}", 0).random() for i in indices]
        return self._place(np.array(u), properties)

    def _place(self, u: np.ndarray, properties: Properties) -> np.ndarray:
        low, high = self.interval(properties)
        mean, std, least, most = spread(properties[self.name])
        if max(low, least) > min(high, most):  # nothing like it: the end nearest to the data
            return np.full(len(u), low if low > most else high)
        two_ends = math.isfinite(low) and math.isfinite(high)
        low, high = max(low, least), min(high, most)
        if two_ends or std == 0.0:
            return low + u * (high - low)
        standard: np.ndarray = truncnorm.ppf(u, (low - mean) / std, (high - mean) / std)
        return mean + std * standard

    def outlying(self, properties: Properties) -> str | None:
        """A sentence if the training data hold nothing or next to nothing like it, else None."""
        row = properties[self.name]
        low, high = self.interval(properties)
        mean, std, least, most = spread(row)
        away = max(low - mean, mean - high, 0.0)
        if low <= most and high >= least and away <= TAIL * std:
            return None
        place = "far in the tail of" if low <= most and high >= least else "outside"
        return (
            f"{self} is {place} the training data, where {self.name} goes from {least:.4g} to "
            f"{most:.4g}{_after(self.unit)} (mean {mean:.4g}, standard deviation about "
            f"{std:.2g})."
        )


@dataclass(frozen=True)
class Value(Target):
    """``name`` = ``value``."""

    value: float

    def interval(self, properties: Properties) -> tuple[float, float]:
        return self.value, self.value

    def error(self, values: Any) -> np.ndarray:
        return np.abs(np.asarray(values, dtype=np.float64) - self.value)

    def _place(self, u: np.ndarray, properties: Properties) -> np.ndarray:
        return np.full(len(u), self.value)

    def __str__(self) -> str:
        return f"{self.name} = {self.value:.6g}{_after(self.unit)}"


@dataclass(frozen=True)
class Range(Target):
    """``low`` <= ``name`` <= ``high``; an infinite end is open."""

    low: float = -math.inf
    high: float = math.inf

    def interval(self, properties: Properties) -> tuple[float, float]:
        return self.low, self.high

    def error(self, values: Any) -> np.ndarray:
        y = np.asarray(values, dtype=np.float64)
        return np.maximum(np.maximum(self.low - y, y - self.high), 0.0)

    def __str__(self) -> str:
        unit = _after(self.unit)
        if math.isinf(self.high):
            return f"{self.name} >= {self.low:.6g}{unit}"
        if math.isinf(self.low):
            return f"{self.name} <= {self.high:.6g}{unit}"
        return f"{self.low:.6g} <= {self.name} <= {self.high:.6g}{unit}"


@dataclass(frozen=True)
class Extreme(Target):
    """As large (``maximise``) or as small as possible."""

    maximise: bool = True

    def interval(self, properties: Properties) -> tuple[float, float]:
        """The best twentieth of the training data, taken as normal, and what lies beyond."""
        mean, std, least, most = spread(properties[self.name])
        if self.maximise:
            return min(mean + BEST * std, most), math.inf
        return -math.inf, max(mean - BEST * std, least)

    def error(self, values: Any) -> np.ndarray:
        return np.full(np.shape(values), np.nan)

    def __str__(self) -> str:
        return f"{self.name} = {'max' if self.maximise else 'min'}"


def spread(row: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Mean, standard deviation (of the normal with that mean absolute deviation), least and
    largest value of a property in the training data."""
    std = float(row["mad"]) * math.sqrt(math.pi / 2.0)
    return float(row["mean"]), std, float(row["min"]), float(row["max"])


# -- units ------------------------------------------------------------------------------------

_MOLAR = 6.02214076e23 * 1.602176634e-19  # J/mol in one eV (SI, exact)
_BOHR = 0.529177210903  # Angstrom (CODATA 2018)

UNITS: dict[str, dict[str, float]] = {
    "energy": {
        "eV": 1.0,
        "meV": 1e-3,
        "Hartree": 27.211386245988,
        "kcal/mol": 4184.0 / _MOLAR,
        "kJ/mol": 1000.0 / _MOLAR,
    },
    "dipole moment": {"D": 1.0},
    "volume": {"bohr^3": 1.0, "Angstrom^3": _BOHR**-3},
    "area": {"bohr^2": 1.0, "Angstrom^2": _BOHR**-2},
    "heat capacity": {"cal/(mol K)": 1.0, "J/(mol K)": 1.0 / 4.184},
    "frequency": {"GHz": 1.0, "MHz": 1e-3},
}
"""Quantity -> unit -> its size in the first unit of that quantity."""

_OTHER_NAMES = {"ha": "hartree", "eh": "hartree", "debye": "d", "a3": "angstrom3"}


def convert(value: float, unit: str, wanted: str) -> float:
    """``value`` in ``unit`` as a number of units ``wanted``.

    Raises:
        ValueError: they do not measure the same quantity; lists the units that do.
    """
    if _plain(unit) == _plain(wanted):
        return value
    for sizes in UNITS.values():
        known = {_plain(name): size for name, size in sizes.items()}
        if _plain(wanted) in known:
            if _plain(unit) not in known:
                raise ValueError(f"it is in {wanted}; known units: {', '.join(sizes)}")
            return value * known[_plain(unit)] / known[_plain(wanted)]
    raise ValueError(f"it is in {wanted}" if wanted else "its unit is not known")


def _plain(unit: str) -> str:
    """A unit without what people write differently: case, brackets, points, powers, spaces."""
    text = unit.strip().replace("\N{ANGSTROM SIGN}", "a").replace("\N{SUPERSCRIPT THREE}", "3")
    text = text.replace("\u00c5", "a").replace("\N{SUPERSCRIPT TWO}", "2")
    if text.startswith("MeV"):  # a million eV is not a thousandth of one
        return text
    text = re.sub(r"[\s()*\u00b7^/_]", "", text.lower())
    return _OTHER_NAMES.get(text, text)


def _after(unit: str) -> str:
    return f" {unit}" if unit else ""


# -- reading ----------------------------------------------------------------------------------

_NUMBER = re.compile(r"\s*([+-]?(?:\d+(?:\.(?!\.)\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*")
_OPERATORS = {"<": "<", "<=": "<", "\u2264": "<", ">": ">", ">=": ">", "\u2265": ">", "=": "="}
_SPLIT = re.compile(r"(<=|>=|[<>=\u2264\u2265])")
FORMS = "name=5.0eV, name>5, name=2..3, name=max or name=min"


def is_inequality(text: str) -> bool:
    """Whether a command line word is an inequality, which no ``key=value`` can be."""
    return any(sign != "=" for sign in _SPLIT.split(text)[1::2])


def as_texts(targets: Mapping[str, Any]) -> list[str]:
    """Property -> wish, as :meth:`Target.parse` reads it: 5.0 -> 'gap=5.0', '>5' -> 'gap>5', and
    '5<gap' or '2<mu<3' as they stand; None is no wish."""
    texts = []
    for name, value in targets.items():
        text = str(value).strip()
        if not is_inequality(text):
            texts += [f"{name}={text}"] * (text != "None")
        else:
            texts.append(f"{name}{text}" if _SPLIT.match(text) else text)
    return texts


def _parse(text: str, properties: Properties) -> Target:
    parts = [part.strip() for part in _SPLIT.split(text)]
    signs = [_OPERATORS[sign] for sign in parts[1::2]]
    if len(parts) == 3 and signs[0] != "=" and _NUMBER.fullmatch(parts[0]):
        parts = [parts[2], parts[1], parts[0]]  # 5 < gap
        signs = ["<" if signs[0] == ">" else ">"]
    if len(parts) == 3:
        name = _find(parts[0], properties)
        return _right_side(text, name, str(properties[name]["unit"]), signs[0], parts[2])
    if len(parts) == 5 and signs[0] == signs[1] != "=":
        name = _find(parts[2], properties)
        ends = parts[::4] if signs[0] == "<" else parts[::-4]
        return _range(text, name, str(properties[name]["unit"]), *ends)
    raise ConfigurationError(f"target '{text}' cannot be read: write {FORMS}.")


def _find(given: str, properties: Properties) -> str:
    known = [name for name, row in properties.items() if "mean" in row]
    if given in known:
        return given
    found = [name for name in known if name.lower() == given.lower()]
    if len(found) != 1:
        raise ConfigurationError(
            f"unknown property '{given}'; the model knows: {', '.join(known) or 'none'}."
        )
    return found[0]


def _right_side(text: str, name: str, unit: str, sign: str, rest: str) -> Target:
    if sign == "=" and rest.lower() in ("max", "min"):
        return Extreme(name, unit, rest.lower() == "max")
    if sign == "=" and ".." in rest:
        low, _, high = rest.partition("..")
        return _range(text, name, unit, low, high)
    value = _in_unit(text, name, unit, *_quantity(text, rest))
    if sign == "=":
        return Value(name, unit, value)
    return Range(name, unit, low=value) if sign == ">" else Range(name, unit, high=value)


def _range(text: str, name: str, unit: str, first: str, second: str) -> Range:
    """A unit after one end holds for both; an end left out is open."""
    ends = [_quantity(text, end) if end.strip() else None for end in (first, second)]
    written = [end[1] for end in ends if end is not None and end[1]]
    if not any(ends):
        raise ConfigurationError(f"target '{text}' cannot be read: write {FORMS}.")
    low, high = (
        open_end if end is None else _in_unit(text, name, unit, end[0], end[1] or "".join(written))
        for end, open_end in zip(ends, (-math.inf, math.inf), strict=True)
    )
    if low > high:
        raise ConfigurationError(
            f"target '{text}' is an empty range: write the smaller end first."
        )
    return Range(name, unit, low, high)


def _quantity(text: str, words: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(words)
    if match is None or not math.isfinite(float(match[1])):
        raise ConfigurationError(
            f"target '{text}': '{words.strip()}' is not a number with a unit: write {FORMS}."
        )
    return float(match[1]), match[2]


def _in_unit(text: str, name: str, wanted: str, value: float, unit: str) -> float:
    if not unit:
        return value
    try:
        return convert(value, unit, wanted)
    except ValueError as error:
        raise ConfigurationError(
            f"target '{text}': '{unit}' is not a unit of '{name}': {error}."
        ) from None
