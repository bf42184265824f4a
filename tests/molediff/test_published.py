from __future__ import annotations

import re

import pytest
import test_properties
import torch

from molediff.cli import PROGRAM
from molediff.geometric.egnn import EGNN, EGNNOptions
from shared.cli import main
from shared.models import load
from shared.schedules import Polynomial

folder = test_properties.folder


def test_an_edm_checkpoint_becomes_a_model(golden, tmp_path):
    tensors, info = golden("02_edm_process_qm9")
    state = {
        k.replace("state.", "dynamics.", 1): v for k, v in tensors.items() if k[:6] == "state."
    }
    torch.save(state, tmp_path / "generative_model_ema.npy")
    arguments = ["convert", str(tmp_path / "generative_model_ema.npy"), f"out={tmp_path / 'edm'}"]
    assert main(PROGRAM, arguments) == 0
    model = load(tmp_path / "edm")
    assert len(model.sample(2, steps=3, seed=0, atoms=4)) == 2
    with pytest.raises(ValueError, match=r"request\.atoms"):
        model.sample(1, steps=3)
    denoiser = model.denoiser.double()
    parts = tensors["step_s1.zt"].split([3, 5, 1], -1)
    seen = denoiser(
        dict(zip(("positions", "types", "charges"), parts, strict=True)),
        2 / info["diffusion"]["timesteps"],
        tensors["in.node_mask"][..., 0].bool(),
    )
    eps = torch.cat([seen[name].eps for name in ("positions", "types", "charges")], -1)
    torch.testing.assert_close(eps, tensors["step_s1.eps_hat"], rtol=1e-8, atol=1e-8)


def test_a_conditional_edm_checkpoint_is_told_its_property(golden, folder, tmp_path):
    tensors, info = golden("02_edm_process_qm9_cond")
    state = {
        k.replace("state.", "dynamics.", 1): v for k, v in tensors.items() if k[:6] == "state."
    }
    torch.save(state, tmp_path / "generative_model_ema.npy")
    words = ["convert", str(tmp_path / "generative_model_ema.npy"), f"out={tmp_path / 'edm'}"]
    assert main(PROGRAM, [*words, "properties=[mass]"]) == 2  # no mean and spread
    assert main(PROGRAM, [*words, "properties=[mass]", f"sizes={folder}"]) == 0
    model = load(tmp_path / "edm")
    made = model.domain.template(0, [0, 1, 2], atoms=5)
    assert made.cond["context"].isfinite().all()  # drawn: the network knows no "not given"
    assert len(model.sample(2, steps=3, seed=0, mass=9.0)) == 2
    denoiser = model.denoiser.double()
    clean = {"positions": tensors["in.x"].double(), "types": tensors["in.one_hot"].double() / 8}
    noise = dict(zip(clean, tensors["nll.eps0"].split([3, 5], -1), strict=True))
    start = denoiser.process.perturb(clean, torch.zeros(3, dtype=torch.float64), noise)
    mask = tensors["in.node_mask"][..., 0].bool()
    seen = denoiser(start, 0.0, mask, {"context": tensors["in.context"][:, 0]})
    eps = torch.cat([seen[name].eps for name in clean], -1)
    torch.testing.assert_close(eps, tensors["nll.net_out0"], rtol=1e-8, atol=1e-8)
    assert info["diffusion"]["norm_values"][:2] == [1, 8]


EDM_NAMES = [
    (r"readout\.", "embedding_out."),
    (r"blocks\.(\d+)\.step\.edge\.first", r"e_block_\1.gcl_equiv.coord_mlp.0"),
    (r"blocks\.(\d+)\.step\.edge\.second", r"e_block_\1.gcl_equiv.coord_mlp.2"),
    (r"blocks\.(\d+)\.step\.length", r"e_block_\1.gcl_equiv.coord_mlp.4"),
    (r"blocks\.(\d+)\.messages\.(\d+)", r"e_block_\1.gcl_\2"),
    (r"edge\.first", "edge_mlp.0"),
    (r"edge\.second", "edge_mlp.2"),
    (r"attention", "att_mlp.0"),
    (r"node\.", "node_mlp."),
]


def edm_file(path, network, **more):
    """What EDM's program would save of such a network."""
    state = {}
    for key, value in network.state_dict().items():
        for ours, theirs in EDM_NAMES:
            key = re.sub(ours, theirs, key)
        state[f"dynamics.egnn.{key}"] = value
    torch.save(state | more, path)
    return path


@pytest.mark.parametrize(
    "options", [{"sublayers": 2}, {"sin_embedding": True}, {"attention": False}]
)
def test_options_that_weights_show_are_read_off_them(tmp_path, options):
    torch.manual_seed(0)
    network = EGNN({"types": 5, "charges": 1}, options=EGNNOptions(width=16, layers=2, **options))
    path = edm_file(tmp_path / "edm.npy", network)
    assert main(PROGRAM, ["convert", str(path), f"out={tmp_path / 'edm'}"]) == 0
    backbone = load(tmp_path / "edm").denoiser.backbone
    inputs = {name: torch.randn(2, 4, w) for name, w in (("positions", 3), ("types", 5))}
    inputs["charges"] = torch.randn(2, 4, 1)
    code = torch.tensor([0.1, 0.7])
    with torch.no_grad():
        wanted, found = network(inputs, code), backbone(inputs, code)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_the_noise_schedule_is_that_of_the_checkpoint(tmp_path, capsys):
    network = EGNN({"types": 5, "charges": 1}, options=EGNNOptions(width=8, layers=1))
    for place, schedule in enumerate([Polynomial(), Polynomial(precision=1e-4, steps=500)]):
        times = torch.linspace(0, 1, schedule.steps + 1).double()
        table = {"gamma.gamma": -2.0 * schedule.log_snr(times).float()}
        path = edm_file(tmp_path / "edm.npy", network, **table)
        assert main(PROGRAM, ["convert", str(path), f"out={tmp_path / str(place)}"]) == 0
        assert load(tmp_path / str(place)).denoiser.process.lead == schedule
    cosine = {"gamma.gamma": torch.linspace(-11.5, 11.5, 1001)}
    learned = {"gamma.l1.weight": torch.ones(1, 1), "gamma.gamma_0": torch.ones(1)}
    for other in (cosine, learned):
        path = edm_file(tmp_path / "edm.npy", network, **other)
        assert main(PROGRAM, ["convert", str(path), f"out={tmp_path / 'no'}"]) == 2
        assert "noise schedule" in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


def test_foreign_files_are_refused(tmp_path, capsys):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert main(PROGRAM, ["convert", str(tmp_path / "other.pt")]) == 2
    assert "no converter" in capsys.readouterr().err
    wide = {"dynamics.egnn.e_block_0.gcl_equiv.coord_mlp.0.weight": torch.zeros(2, 2)}
    wide["dynamics.egnn.embedding.weight"] = torch.zeros(4, 12)
    torch.save(wide, tmp_path / "wide.pt")
    assert main(PROGRAM, ["convert", str(tmp_path / "wide.pt"), f"out={tmp_path / 'x'}"]) == 2
    assert "11 features" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
