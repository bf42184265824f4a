from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from molediff.geometric.energies import (
    Composition,
    UserEnergy,
    fingerprint_energy,
    property_energy,
)
from molediff.geometric.process import molecule_process
from molediff.molecules import Molecule
from molediff.own import load_function
from molediff.targets import Target
from shared.configuration import ConfigurationError
from shared.guidance import Energy, Guided, Term
from shared.predictions import Prediction
from shared.process import State, alpha_sigma

F64 = torch.float64
ELEMENTS = (1, 6, 7, 8, 9)
PROPERTIES = {
    "mu": {"unit": "D", "mean": 2.5, "mad": 1.0, "min": 0.0, "max": 22.5},
    "gap": {"unit": "eV", "mean": 7.0, "mad": 2.0, "min": 1.0, "max": 13.0},
}


def predict(x: State, t: object, mask: object = None, cond: object = None) -> torch.Tensor:
    """Two 'properties': the number of carbons, and the squared size."""
    return torch.stack([x["types"][..., 1].sum(1), x["positions"].square().sum((1, 2))], 1)


def state(*rows: str, scale: float = 1.0) -> tuple[State, torch.Tensor]:
    """Molecules given by their symbols, with any positions."""
    n, order = max(map(len, rows)), "HCNOF"
    mask = torch.arange(n) < torch.tensor([len(row) for row in rows])[:, None]
    types = torch.zeros(len(rows), n, 5, dtype=F64)
    for i, row in enumerate(rows):
        for j, symbol in enumerate(row):
            types[i, j, order.index(symbol)] = scale
    x = torch.randn(len(rows), n, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    process = molecule_process()
    return process.project({"positions": x, "types": types}, mask), mask


# -- properties -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gap=5", [1.0, 1.0, 9.0]),  # (y + 1)^2 with y = 0, -2, 2
        ("gap>5", [0.0, 1.0, 0.0]),
        ("gap<5", [1.0, 0.0, 9.0]),
        ("gap=5..9", [0.0, 1.0, 1.0]),
        ("gap=max", [3.0, 5.0, 1.0]),  # the best of the data, 13 eV, is at 3
        ("gap=min", [3.0, 1.0, 5.0]),
    ],
)
def test_energies_of_targets(text, expected):
    y = torch.tensor([[9.0, 0.0], [9.0, -2.0], [9.0, 2.0]])
    target = Target.parse(text, PROPERTIES)
    energy = property_energy(lambda *_: y, PROPERTIES, 1, target)
    assert energy({"x": y}, 0.5).tolist() == pytest.approx(expected)
    assert energy.name == str(target)


def test_pull_of_an_extreme_ends_at_the_best_of_the_data():
    y = torch.tensor([[-1.0], [2.9], [3.1], [50.0]], requires_grad=True)
    energy = property_energy(lambda *_: y, PROPERTIES, 0, Target.parse("gap=max", PROPERTIES))
    energy({"x": y}, 0.5).sum().backward()
    assert y.grad.flatten().tolist() == [-1.0, -1.0, 0.0, 0.0]


def test_targets_of_each_molecule():
    y = torch.zeros(3, 2)
    energy = property_energy(lambda *_: y, PROPERTIES, 0, "wanted")
    values = energy({"x": y}, 0.5, None, {"wanted": torch.tensor([0.0, 1.0, 2.0])})
    assert values.tolist() == [0.0, 1.0, 4.0]
    with pytest.raises(ValueError, match="needs the condition 'wanted'"):
        energy({"x": y}, 0.5)


def test_fingerprints():
    logits = torch.tensor([[math.log(3.0), 0.0, -100.0]])
    energy = fingerprint_energy(lambda *_: logits, np.array([1, 0, 0], np.uint8))
    assert energy({"x": logits}, 0.5).item() == pytest.approx(0.25**2 + 0.5**2)


# -- composition ------------------------------------------------------------------------------


def test_composition_counts_atoms():
    x, mask = state("CCO", "CNNOH", "F", scale=0.25)
    words = ["C=2", "N<=1", "F=0", "O>0"]
    energy = Composition.parse(words, ELEMENTS, 0.25)
    assert energy(x, 0.1, mask).tolist() == [0.0, 2.0, 4.0 + 1.0 + 1.0]
    molecules = [Molecule(np.array(z)) for z in ([6, 6, 8], [6, 7, 7, 8, 1], [9])]
    assert [energy.error(m) for m in molecules] == [0, 2, 4]


def test_composition_ignores_the_padding_and_has_a_slope():
    x, mask = state("CC", "CCCC")
    energy = Composition.parse(["C=3..3", "N=0"], ELEMENTS, 1.0)
    noisy = x["types"] + 0.5  # also where there is no atom
    types = noisy.clone().requires_grad_()
    values = energy({**x, "types": types}, 0.1, mask)
    assert values.tolist() == [1.0, 3.0**2 + 2.0**2]
    values.sum().backward()
    assert not bool(types.grad[~mask].any())
    assert types.grad[1, :, 1].tolist() == [6.0] * 4
    assert types.grad[1, :, 2].tolist() == [4.0] * 4
    assert not bool(types.grad[..., [0, 3, 4]].any())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["C~3"], "'C~3' cannot be read: write C=6"),
        (["C<=2..3"], "cannot be read"),
        (["Xx=1"], "'Xx=1': unknown element"),
        (["Br=0"], "'Br=0': the model makes only H, C, N, O, F"),
        (["C<0"], "'C<0' allows no number"),
        (["C=6..4"], "allows no number"),
        (["N>=3", "N<2"], "'N<2': no number of N atoms is left"),
    ],
)
def test_compositions_that_cannot_be(words, message):
    with pytest.raises(ConfigurationError, match=message):
        Composition.parse(words, ELEMENTS, 1.0)


# -- the user's own ---------------------------------------------------------------------------

OWN = """
from __future__ import annotations
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class Settings:
    weight: float = 2.0

def carbons(positions, elements, mask):
    assert mask.dtype == torch.bool
    return Settings().weight * elements["C"].sum(1) + positions.square().sum((1, 2))

def flat(positions, elements, mask):
    spread = positions.transpose(1, 2) @ positions / mask.sum(1)[:, None, None]
    return torch.linalg.eigvalsh(spread)[:, 0]

def scalar(positions, elements, mask):
    return positions.sum()

def number(positions, elements, mask):
    return 3.0

def bromines(positions, elements, mask):
    return elements["Br"].sum(1)

def shapes(positions, elements, mask):
    return positions.reshape(7, 7)

def blind(positions, elements, mask):
    return positions.detach().square().sum((1, 2))

constant = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def load(own: Path, name: str, scale: float = 1.0) -> UserEnergy:
    return UserEnergy.load(f"{own}:{name}", ELEMENTS, scale)


def test_own_functions_see_angstrom_and_elements(own):
    x, mask = state("CCO", "C", scale=0.25)
    value = load(own, "carbons", 0.25)(x, 0.1, mask)
    size = x["positions"].square().sum((1, 2))
    torch.testing.assert_close(value, torch.tensor([4.0, 2.0], dtype=F64) + size)
    one = {name: v[1:, :1] for name, v in x.items()}  # no mask: every atom is real
    torch.testing.assert_close(load(own, "carbons", 0.25)(one, 0.1)[0], value[1])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("scalar", ValueError, r"own.py:scalar' returns \(\): return a tensor .*\(2,\)"),
        ("number", ValueError, r"own.py:number' returns float"),
        ("bromines", ValueError, r"own.py:bromines' fails: KeyError: 'Br'"),
        ("shapes", RuntimeError, r"own.py:shapes': "),
    ],
)
def test_own_functions_that_fail(own, name, error, message):
    x, mask = state("CCO", "CNO")
    with pytest.raises(error, match=message):
        load(own, name)(x, 0.1, mask)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("own.txt:f", "write FILE.py:FUNCTION"),
        ("own.py", "write FILE.py:FUNCTION"),
        ("absent.py:f", "there is no file absent.py"),
        ("{own}:missing", "has no function 'missing'; it has Settings, bromines, carbons"),
        ("{own}:constant", "has no function 'constant'"),
        ("{broken}:f", "cannot be run: ZeroDivisionError: division by zero"),
    ],
)
def test_files_without_an_energy(own, text, message):
    broken = own.with_name("broken.py")
    broken.write_text("1 / 0\n")
    with pytest.raises(ConfigurationError) as caught:
        load_function(text.format(own=own, broken=broken), "own energy")
    said = str(caught.value).replace("dataclass, ", "").replace("carbons, flat", "carbons")
    assert message.split("; it has")[0] in said


# -- guidance ---------------------------------------------------------------------------------


def shrink(x: State, t: float, mask: object = None, cond: object = None) -> dict:
    """A denoiser that believes x_0 = x_t / 2."""
    schedule = molecule_process().lead
    out = {}
    for name, v in x.items():
        alpha, sigma = alpha_sigma(schedule, t, v)
        out[name] = Prediction(v, alpha, sigma, x0=0.5 * v)
    return out


def push(energy: Energy, at: str, x: State, mask: torch.Tensor) -> State:
    process = molecule_process()
    guided = Guided(shrink, process, [Term(energy, at=at)])
    with torch.no_grad():
        new, old = guided(x, 0.3, mask), shrink(x, 0.3, mask)
    return {n: (new[n].eps - old[n].eps) / old[n].sigma for n in x}


def test_a_gradient_is_projected_and_turns_with_the_molecule(own):
    x, mask = state("CCOH", "CN")
    energy = load(own, "flat")
    got = push(energy, "estimate", x, mask)["positions"]
    assert float(got.abs().max()) > 1e-3
    assert float(got.sum(1).abs().max()) < 1e-12
    assert not bool(got[~mask].any())
    turn = torch.linalg.qr(
        torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    )[0]
    turned = push(energy, "estimate", {**x, "positions": x["positions"] @ turn}, mask)
    torch.testing.assert_close(turned["positions"], got @ turn, rtol=0, atol=1e-12)


def test_a_function_that_forgets_its_gradient_is_named(own):
    x, mask = state("CCOH", "CN")
    with pytest.raises(ValueError, match=r"own.py:blind' does not depend on the state"):
        push(load(own, "blind"), "estimate", x, mask)


def test_property_guidance_moves_every_molecule_to_its_own_target():
    x, mask = state("CCOH", "CN")
    wanted = {"wanted": torch.tensor([9.0, -9.0], dtype=F64)}
    energy = property_energy(predict, PROPERTIES, 0, "wanted")
    process = molecule_process()
    guided = Guided(shrink, process, [Term(energy)])
    with torch.no_grad():
        new, old = guided(x, 0.3, mask, wanted), shrink(x, 0.3, mask)
    step = (new["types"].eps - old["types"].eps)[..., 1]  # minus the direction of the step
    assert bool((step[0] < 0.0).all())
    assert bool((step[1][mask[1]] > 0.0).all())
    assert not bool(step[1][~mask[1]].any())
