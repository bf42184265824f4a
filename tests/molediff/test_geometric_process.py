import numpy as np
import torch

from molediff.geometric.process import (
    POSITION_STD,
    fast_times,
    karras_heads,
    molecule_process,
)
from shared.schedules import Polynomial, VarianceExploding


def test_fields_and_degrees_of_freedom():
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    process = molecule_process(charges=True)
    x = {
        "positions": torch.zeros(2, 4, 3),
        "types": torch.zeros(2, 4, 5),
        "charges": torch.zeros(2, 4, 1),
    }
    assert list(process.fields) == ["positions", "types", "charges"]
    assert process.dim(x, mask).tolist() == [9 + 20 + 4, 3 + 10 + 2]
    assert list(molecule_process().fields) == ["positions", "types"]


def test_samplers_start_from_unit_normals_where_the_signal_is_gone():
    noise = {k: torch.ones(1, 2, 3) for k in ("positions", "types")}
    assert torch.equal(molecule_process().prior(noise)["positions"], noise["positions"])
    ve = molecule_process(VarianceExploding(sigma_max=20.0)).prior(noise)
    torch.testing.assert_close(ve["positions"], 20.0 * noise["positions"])


def test_training_times_follow_the_stated_law():
    schedule, gen = Polynomial(), torch.Generator().manual_seed(0)
    t = fast_times()(schedule, 20_000, gen)
    log_snr = 2.0 * schedule.log_snr(t)
    assert abs(log_snr.mean() - 1.5) < 0.03
    assert abs(log_snr.std() - 2.2) < 0.05
    assert log_snr.min() >= -11.0 - 1e-6
    assert log_snr.max() <= 11.4 + 1e-6


def test_preconditioned_inputs_have_unit_variance():
    heads, schedule = karras_heads(5, scale=0.25), Polynomial()
    for t in (0.0, 0.1, 0.5, 1.0):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        for name, variance in (("positions", POSITION_STD**2), ("types", 0.25**2 / 5)):
            scale = heads[name].parameterisation.scale_in(alpha, sigma)
            assert abs(scale**2 * (alpha**2 * variance + sigma**2) - 1.0) < 1e-12


def test_position_std_is_that_of_the_data(data_folder):
    with np.load(data_folder("qm9/geometries.npz")) as data:
        sizes, x = data["num_atoms"], data["positions"].astype(np.float64)
    molecule = np.repeat(np.arange(len(sizes)), sizes)
    sums = np.stack([np.bincount(molecule, x[:, k]) for k in range(3)], 1)
    centred = x - (sums / sizes[:, None])[molecule]
    assert abs(centred.std() - POSITION_STD) < 0.01
