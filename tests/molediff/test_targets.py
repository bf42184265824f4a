from __future__ import annotations

import math

import numpy as np
import pytest

from molediff.targets import UNITS, Extreme, Range, Target, Value, convert, is_inequality
from shared.configuration import ConfigurationError

PROPERTIES = {
    "A": {"unit": "GHz", "mean": 26.8, "mad": 46.8, "min": 0.0, "max": 619867.7},
    "mu": {"unit": "D", "mean": 2.67, "mad": 1.17, "min": 0.0, "max": 22.96},
    "alpha": {"unit": "bohr^3", "mean": 75.4, "mad": 6.2, "min": 13.2, "max": 132.5},
    "homo": {"unit": "eV", "mean": -6.53, "mad": 0.44, "min": -10.55, "max": -2.77},
    "gap": {"unit": "eV", "mean": 6.87, "mad": 1.07, "min": 1.14, "max": 13.74},
    "cv": {"unit": "cal/(mol K)", "mean": 31.7, "mad": 3.18, "min": 6.4, "max": 46.4},
    "score": {"unit": "", "mean": 0.5, "mad": 0.1, "min": 0.0, "max": 1.0},
    "empty": {"unit": "eV", "n": 0},
}


def parse(text: str) -> Target:
    return Target.parse(text, PROPERTIES)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("gap=5", Value("gap", "eV", 5.0)),
        ("gap = 5.0eV", Value("gap", "eV", 5.0)),
        ("GAP=5000 meV", Value("gap", "eV", 5.0)),
        ("homo=-6.5", Value("homo", "eV", -6.5)),
        ("gap=5.", Value("gap", "eV", 5.0)),
        ("score=.5", Value("score", "", 0.5)),
        ("A=2e3MHz", Value("A", "GHz", 2.0)),
        ("gap>5", Range("gap", "eV", low=5.0)),
        ("gap>=5 eV", Range("gap", "eV", low=5.0)),
        ("5 < gap", Range("gap", "eV", low=5.0)),
        ("gap ≤ 5", Range("gap", "eV", high=5.0)),
        ("mu=2.0..3.0", Range("mu", "D", 2.0, 3.0)),
        ("mu=2..3 debye", Range("mu", "D", 2.0, 3.0)),
        ("mu=2D..3", Range("mu", "D", 2.0, 3.0)),
        ("homo=-7..-6", Range("homo", "eV", -7.0, -6.0)),
        ("gap=4000meV..5eV", Range("gap", "eV", 4.0, 5.0)),
        ("mu=2..", Range("mu", "D", low=2.0)),
        ("2 < mu < 3", Range("mu", "D", 2.0, 3.0)),
        ("3>=mu>=2 D", Range("mu", "D", 2.0, 3.0)),
        ("homo=max", Extreme("homo", "eV")),
        ("alpha=MIN", Extreme("alpha", "bohr^3", maximise=False)),
        ("Cv=30 cal/mol/K", Value("cv", "cal/(mol K)", 30.0)),
    ],
)
def test_words_become_targets(text, target):
    assert parse(text) == target


@pytest.mark.parametrize(
    ("value", "unit", "wanted", "expected"),
    [
        (1.0, "Hartree", "eV", 27.211386245988),
        (1.0, "kcal/mol", "eV", 4184.0 / 96485.3321233100184),
        (96.4853321233, "kJ/mol", "eV", 1.0),
        (1.0, "Å^3", "bohr^3", 6.7483345),
        (1.0, "Angstrom³", "bohr3", 6.7483345),
        (4.184, "J/(mol*K)", "cal/(mol K)", 1.0),
        (3.0, "kg", "kg", 3.0),
    ],
)
def test_units(value, unit, wanted, expected):
    assert convert(value, unit, wanted) == pytest.approx(expected, rel=1e-8)


def test_no_unit_has_two_meanings():
    names = [name.lower() for sizes in UNITS.values() for name in sizes]
    assert len(names) == len(set(names))
    assert all(next(iter(sizes.values())) == 1.0 for sizes in UNITS.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gap=5D", "'D' is not a unit of 'gap': it is in eV; known units: eV, meV, Hartree"),
        ("gap=5MeV", "'MeV' is not a unit of 'gap'"),
        ("score=5 eV", "'eV' is not a unit of 'score': its unit is not known"),
        ("gpa=5", "unknown property 'gpa'; the model knows: A, mu, alpha, homo, gap, cv, score"),
        ("empty=5", "unknown property 'empty'"),
        ("gap=five", "'five' is not a number with a unit"),
        ("gap=nan", "'nan' is not a number"),
        ("gap=1e999", "'1e999' is not a number"),
        ("gap=", "'' is not a number"),
        ("gap=3..2", "'gap=3..2' is an empty range: write the smaller end first"),
        ("5 < gap < 2", "empty range"),
        ("gap=a..2", "'a' is not a number"),
        ("gap=..", "cannot be read"),
        ("gap", "'gap' cannot be read: write name=5.0eV"),
        ("1 < gap > 2", "cannot be read"),
        ("gap>max", "'max' is not a number"),
    ],
)
def test_mistakes_are_named_in_one_line(text, message):
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_inequalities_are_told_from_assignments():
    assert is_inequality("gap>5")
    assert is_inequality("2 <= mu <= 3")
    assert not is_inequality("gap=5")
    assert not is_inequality("n")


def test_errors_are_distances():
    values = [4.0, 5.5, 7.0, math.nan]
    np.testing.assert_allclose(parse("gap=5").error(values), [1.0, 0.5, 2.0, math.nan])
    np.testing.assert_allclose(parse("gap=5..6").error(values), [1.0, 0.0, 1.0, math.nan])
    np.testing.assert_allclose(parse("gap>5").error(values), [1.0, 0.0, 0.0, math.nan])
    assert np.isnan(parse("gap=max").error(values)).all()


def test_draws_belong_to_samples():
    target = parse("mu=2..3")
    together = target.draw(PROPERTIES, 0, range(50))
    assert target.draw(PROPERTIES, 0, [7])[0] == together[7]
    assert (target.draw(PROPERTIES, 1, range(50)) != together).all()
    assert (parse("gap=2..3").draw(PROPERTIES, 0, range(50)) != together).all()


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [
        ("mu=2..3", 2.0, 3.0, 2.5),
        ("mu=20..1000", 20.0, 22.96, 21.48),
        ("gap=5", 5.0, 5.0, 5.0),
        # the mean of a normal above a is mean + std * phi(z) / (1 - Phi(z)), z = (a - mean) / std
        ("gap>6.87", 6.87, 13.74, 6.87 + 1.07),
        ("gap<6.87", 1.14, 6.87, 6.87 - 1.07),
        ("gap=max", 9.07, 13.74, 6.87 + 2.0627 * 1.07 * math.sqrt(math.pi / 2)),
        ("gap=min", 1.14, 4.67, 6.87 - 2.0627 * 1.07 * math.sqrt(math.pi / 2)),
        ("gap>13", 13.0, 13.74, 13.21),
        ("gap>20", 20.0, 20.0, 20.0),
        ("gap<-3", -3.0, -3.0, -3.0),
    ],
)
def test_draws_lie_in_the_wish_and_in_the_data(text, low, high, mean):
    values = parse(text).draw(PROPERTIES, 3, range(1000))
    assert low - 1e-3 <= values.min()
    assert values.max() <= high + 1e-3
    assert values.mean() == pytest.approx(mean, abs=4.0 * values.std() / 1000**0.5 + 0.01)


def test_outlying_targets_are_named_with_the_range_of_the_data():
    for text in ("gap=5", "gap>5", "gap=1..3", "homo=max", "gap=0..100", "mu<3"):
        assert parse(text).outlying(PROPERTIES) is None
    said = parse("gap=20").outlying(PROPERTIES)
    assert said is not None
    assert said.startswith("gap = 20 eV is outside the training data, where gap goes from 1.14 to")
    assert "far in the tail" in str(parse("mu=15..16").outlying(PROPERTIES))
    assert "outside" in str(parse("mu<-1").outlying(PROPERTIES))


def test_targets_print_as_they_are_written():
    words = [str(parse(t)) for t in ("gap=5", "gap>5", "gap<5", "mu=2..3", "homo=min", "score=1")]
    assert words == [
        "gap = 5 eV",
        "gap >= 5 eV",
        "gap <= 5 eV",
        "2 <= mu <= 3 D",
        "homo = min",
        "score = 1",
    ]
    for word in words:
        assert str(parse(word)) == word
