"""What a chemist asks for, in words; and command lines that ask for it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from molediff import scorers
from molediff.scorers import Scorer
from molediff.targets import (
    Extreme,
    Properties,
    Range,
    Target,
    Value,
    as_texts,
    is_inequality,
)
from shared import configuration
from shared.configuration import ConfigurationError, nearest


@dataclass(frozen=True)
class Wish:
    """Everything that is wanted of the molecules; plain values, so that it is saved as it is.

    Args:
        targets: property -> what is wanted of it: a number or the words of
            :mod:`molediff.targets` ('5.0eV', '2..3', '>5', 'max').
        atoms: number of atoms, or a range '15..20'.
        scaffold: what every molecule contains; see :meth:`Fragment.read`.
        new: how many atoms to add to it, a number or a range.
        composition: limits such as 'C=6 N<=1 F=0'.
        similar: SMILES, or a file whose first molecule is to be resembled.
        energy: a torch function on the estimate of the molecule, 'path.py:function'.
        score: scorers separated by ';', such as 'qed>0.6; lacks:[N+](=O)[O-]'.
    """

    targets: Mapping[str, Any] = field(default_factory=dict)
    atoms: int | str | None = None
    scaffold: str | None = None
    new: int | str | None = None
    composition: str | None = None
    similar: str | None = None
    energy: str | None = None
    score: str | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def parsed(self, known: Properties) -> list[Target]:
        """The targets in the units of the training data.

        Raises:
            ConfigurationError: one that cannot be read, in a line.
        """
        for name in self.targets:
            hint = nearest(name, configuration.known_keys("design"))
            if hint and not nearest(name.lower(), map(str.lower, known)):
                raise ConfigurationError(
                    f"unknown property '{name}'{hint} The model knows: {', '.join(known)}."
                )
        return [Target.parse(text, known) for text in as_texts(self.targets)]

    @cached_property
    def limits(self) -> list[str]:
        """The composition, word by word."""
        text = re.sub(r"\s*(<=|>=|=|<|>)\s*", r"\1", self.composition or "")
        return [word for word in re.split(r"[\s,;]+", text) if word]

    @cached_property
    def scorers(self) -> list[Scorer]:
        """What steers without gradients.

        Raises:
            ConfigurationError: an unknown scorer, or a wish that cannot be read.
        """
        texts = _BETWEEN.split(self.score or "")
        return [_scorer(text.strip()) for text in texts if text.strip()]


_BETWEEN = re.compile(r";(?![^\[\]]*\])")
"""A semicolon between scorers; one in the brackets of a SMARTS pattern belongs to it."""
_AIM = re.compile(r"(?P<name>[^<>=]+?)\s*(?P<sign><=|>=|<|>|=)\s*(?P<rest>.+)")


def _scorer(text: str) -> Scorer:
    head = text.partition(":")[0].lower()
    aim = None if head in scorers.WITH_ARGUMENT else _AIM.fullmatch(text)
    try:
        found = scorers.scorer(aim["name"] if aim else text)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigurationError(f"score '{text}': {error}") from None
    if aim is None:
        return found
    return found.aimed(_aim(text, found, aim["sign"], aim["rest"]))


def _aim(text: str, scorer: Scorer, sign: str, rest: str) -> Target:
    name, unit = scorer.name, scorer.unit
    if sign == "=" and rest in ("max", "min"):
        return Extreme(name, unit, rest == "max")
    try:
        ends = [float(end) for end in (rest.split("..", 1) if sign == "=" else [rest])]
    except ValueError:
        ends = [math.nan]
    if not all(map(math.isfinite, ends)):
        raise ConfigurationError(
            f"score '{text}': '{rest}' is not a number: write {name}>0.5, {name}=0.4..0.6 or "
            f"{name}=max."
        )
    if ends[0] > ends[-1]:
        raise ConfigurationError(f"score '{text}' is an empty range: write the smaller end first.")
    if sign == "=":
        return Range(name, unit, *ends) if len(ends) == 2 else Value(name, unit, *ends)
    return Range(name, unit, low=ends[0]) if ">" in sign else Range(name, unit, high=ends[0])


# -- the command line -------------------------------------------------------------------------

TEXTS = ("scaffold", "composition", "similar", "energy", "score")
"""Keys whose values are texts of the user's, with any characters."""


def as_overrides(words: Sequence[str]) -> list[str]:
    """Words of ``molediff design`` in Hydra's grammar: what is no key of the command is a target,
    ``gap=5.0`` -> ``++targets.gap=5.0``, ``gap>5`` -> ``++targets.gap='>5'``; with a ``gap<7``
    beside it a range.

    Raises:
        ConfigurationError: a word that is no target, or two targets for one property.
    """
    known = {key.partition(".")[0] for key in configuration.known_keys("design")}
    overrides, wishes = [], dict[str, list[tuple[str, str]]]()
    for word in words:
        key, equals, value = word.partition("=")
        name = key.strip("+~").partition(".")[0]
        if name in TEXTS and equals:
            overrides.append(f"{key}={_quoted(value)}" if value != "null" else word)
        elif name in known or word.startswith("-") or not (equals or is_inequality(word)):
            overrides.append(word)
        else:
            name, text = _target(word)
            wishes.setdefault(name.lower(), []).append((name, text))
    merged = (_one_wish(found[0][0], [text for _, text in found]) for found in wishes.values())
    return overrides + [f"++targets.{name}={_value(text)}" for name, text in merged]


def _target(word: str) -> tuple[str, str]:
    """The property and what is wanted of it."""
    if not is_inequality(word):
        key, _, value = word.partition("=")
        return key.strip(), value.strip()
    names = [part.strip() for part in re.split(r"[<>=\u2264\u2265]+", word)]
    names = [part for part in names if part[:1].isalpha()]
    if len(names) != 1 or not re.fullmatch(r"\w+", names[0]):
        raise ConfigurationError(
            f"'{word}' is not a target: write gap=5.0, 'gap>5', mu=2..3 or homo=max."
        )
    text = word.strip()
    return names[0], text[len(names[0]) :].strip() if text.startswith(names[0]) else text


def _one_wish(name: str, texts: Sequence[str]) -> tuple[str, str]:
    """All that is wanted of one property as one text; two open ends make a range."""
    if len(texts) == 1:
        return name, texts[0]
    ends = {text[:1].translate(_STRICT): text[1:].lstrip("= ") for text in texts}
    if len(texts) > 2 or set(ends) != {"<", ">"}:
        raise ConfigurationError(
            f"{name} has {len(texts)} targets: write one, such as {name}=2..3."
        )
    return name, f"{ends['>']} < {name} < {ends['<']}"


_STRICT = str.maketrans("\u2264\u2265", "<>")


def _value(text: str) -> str:
    """Numbers and sweeps over them as they are, everything else in quotes."""
    plain = all(re.fullmatch(r"[+-]?[\d.eE+-]+", part) for part in text.split(","))
    return text if plain and ".." not in text else _quoted(text)


def _quoted(text: str) -> str:
    if text[:1] in ("'", '"') and text[-1:] == text[:1]:
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
