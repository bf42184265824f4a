import pytest
import torch

from pointdiff.guidance import ScanConsistency, consistent
from shared.predictions import Prediction
from shared.process import Process
from shared.schedules import Karras

PROCESS = Process.single(Karras(0.02, 5.0))


def test_the_energy_is_the_likelihood_of_the_scan():
    cloud = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]], requires_grad=True)
    partial = torch.tensor([[[0.1, 0, 0, 1], [-0.3, 0, 0, 1], [1, 0, 0.2, 1], [9, 9, 9, -1]]])
    energy = ScanConsistency(PROCESS, deviation=0.3)
    value = energy({"x": cloud}, 0.4, None, {"partial": partial})
    # two points share the first, one has the second; mirrored points do not count
    expected = ((0.1**2 + 0.3**2) / 2 + 0.2**2) / (2 * (0.3**2 + 0.4**2))
    torch.testing.assert_close(value, torch.tensor([expected]))
    value.backward()
    step = cloud - (0.3**2 + 0.4**2) * cloud.grad
    torch.testing.assert_close(
        step, torch.tensor([[[-0.1, 0, 0], [1, 0, 0.2]]]), atol=1e-6, rtol=0
    )
    with pytest.raises(ValueError, match="condition 'partial'"):
        energy({"x": cloud}, 0.4)


def test_guidance_brings_the_estimate_to_the_scan():
    def denoise(x, t, mask=None, cond=None):
        return {"x": Prediction(x["x"], 1.0, t, x0=0.9 * x["x"])}

    generator = torch.Generator().manual_seed(0)
    x = {"x": torch.randn(2, 200, 3, generator=generator)}
    scan = torch.randn(2, 50, 3, generator=generator)
    cond = {"partial": torch.cat([scan, torch.ones(2, 50, 1)], 2)}

    def gap(found):
        return torch.cdist(scan, found["x"].x0).amin(2).square().mean()

    plain = gap(denoise(x, 0.5, None, cond))
    assert gap(consistent(denoise, PROCESS)(x, 0.5, None, cond)) < 0.2 * plain
    weak = gap(consistent(denoise, PROCESS, scale=0.3)(x, 0.5, None, cond))
    assert 0.2 * plain < weak < plain
