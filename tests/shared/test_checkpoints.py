"""Checkpoints: round trips, every kind of damage, death while writing."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from importlib import metadata

import pytest
import torch
from torch import nn

from shared import checkpoints
from shared.checkpoints import MANIFEST, CheckpointError


def network(width=3, bias=True, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, width, bias=bias), nn.BatchNorm1d(width)).double()


def save(path, module=None, **changes):
    given = {"config": {"w": 3}, "domain": {"scale": [0.5]}, "step": 7, **changes}
    checkpoints.save(path, module or network(), **given)
    return path


def tensor_file(path, kind="weights"):
    return next(path.glob(f"{kind}-*"))


def test_round_trip_keeps_every_bit(tmp_path):
    module = network()
    ema = {"0.weight": module[0].weight.detach() + 1}
    training = {"optimizer": {"state": {0: torch.ones(2)}, "lr": [0.1]}, "name": "x", "n": None}
    save(tmp_path / "a", module, ema=ema, training=training)
    found = checkpoints.load(tmp_path / "a")
    assert (found.step, found.config, found.statistics) == (7, {"w": 3}, {"scale": [0.5]})
    assert found.versions["torch"] == metadata.version("torch")
    assert torch.equal(found.training()["optimizer"]["state"][0], torch.ones(2))
    averaged, plain = network(seed=1), network(seed=1)
    checkpoints.apply(found, averaged)
    checkpoints.apply(found, plain, ema=False)
    assert torch.equal(averaged[0].weight, ema["0.weight"])
    assert torch.equal(plain[0].weight, module[0].weight)
    assert torch.equal(averaged[0].bias, module[0].bias)


def test_tied_weights_are_saved(tmp_path):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    checkpoints.apply(checkpoints.load(save(tmp_path / "a", module)), module)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load_into_the_models_dtype(tmp_path, dtype):
    module = network().float()
    module.register_buffer("table", torch.full((1,), 1 / 3, dtype=torch.float64))
    whole = tensor_file(save(tmp_path / "whole", module)).stat().st_size
    path = save(tmp_path / "half", module, dtype=dtype)
    assert tensor_file(path).stat().st_size < whole
    other = network(seed=1).float()
    other.register_buffer("table", torch.zeros(1, dtype=torch.float64))
    checkpoints.apply(checkpoints.load(path), other)
    assert other[0].weight.dtype == torch.float32
    assert torch.equal(other[0].weight, module[0].weight.to(dtype).float())
    assert torch.equal(other.table, module.table)  # float64 stays whole


def test_a_newer_checkpoint_replaces_the_older_one(tmp_path):
    for step in range(3):
        save(tmp_path / "a", network(seed=step), step=step, training={"step": step})
    assert checkpoints.load(tmp_path / "a").step == 2
    assert len(list((tmp_path / "a").iterdir())) == 3


def test_a_failed_save_leaves_the_older_one(tmp_path):
    save(tmp_path / "a", step=1)
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path / "a", network(seed=1), step=2, domain={"scale": float("nan")})
    assert checkpoints.load(tmp_path / "a").step == 1
    assert not list((tmp_path / "a").glob(".*"))


def damage(path, how):
    """Spoils a good checkpoint; returns what to load."""
    manifest = json.loads((path / MANIFEST).read_text())
    file = tensor_file(path)
    if how == "absent":
        return path / "nowhere"
    if how == "no manifest":
        (path / MANIFEST).unlink()
    elif how == "half a manifest":
        (path / MANIFEST).write_text((path / MANIFEST).read_text()[:40])
    elif how == "other JSON":
        (path / MANIFEST).write_text("[1, 2]")
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif how == "missing tensors":
        file.unlink()
    elif how == "altered":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    elif how == "newer":
        (path / MANIFEST).write_text(json.dumps({"format": checkpoints.FORMAT + 1}))
    elif how == "escape":
        manifest["files"]["weights"]["name"] = f"../{path.name}/{file.name}"
        (path / MANIFEST).write_text(json.dumps(manifest))
    elif how == "lacking":
        del manifest["config"]
        (path / MANIFEST).write_text(json.dumps(manifest))
    elif how == "pickled":
        torch.save(network(), path / "model.ckpt")
        return path / "model.ckpt"
    elif how == "legacy pickle":
        torch.save(network(), path / "old", _use_new_zipfile_serialization=False)
        return path / "old"
    elif how == "a file":
        (path / "notes.txt").write_text("hello")
        return path / "notes.txt"
    return path


BAD = {
    "absent": "no checkpoint at",
    "no manifest": "no checkpoint at .* has no checkpoint.json",
    "half a manifest": "truncated or is not JSON",
    "other JSON": "does not describe a checkpoint",
    "truncated": "truncated: .* bytes; copy it again",
    "missing tensors": "incomplete: weights-.* is missing",
    "altered": "SHA-256",
    "newer": "format 2, this version reads up to 1; upgrade",
    "escape": "outside its folder",
    "lacking": "lacks config",
    "pickled": "pickled file.*`convert`",
    "legacy pickle": "pickled file.*`convert`",
    "a file": "a checkpoint is a folder",
}


@pytest.mark.parametrize("how", BAD)
def test_every_bad_checkpoint_gets_one_clear_sentence(tmp_path, how):
    target = damage(save(tmp_path / "a"), how)
    with pytest.raises((FileNotFoundError, CheckpointError), match=BAD[how]) as caught:
        checkpoints.load(target)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (network(width=4), r"3 of another shape|of another shape \(0.bias \[3\] float64"),
        (network(bias=False), r"1 unexpected \(0.bias\)"),
        (nn.Sequential(*network(), nn.Linear(3, 1)), r"2 missing \(2.bias, 2.weight\)"),
        (nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)]), r"\.\.\."),
    ],
)
def test_another_model_is_refused_before_anything_changes(tmp_path, other, message):
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        checkpoints.apply(checkpoints.load(save(tmp_path / "a")), other)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_weights_without_training_state_say_so(tmp_path):
    with pytest.raises(CheckpointError, match="weights only"):
        checkpoints.load(save(tmp_path / "a")).training()


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_pickled_tensors_are_read_without_running_code(tmp_path):
    module = network()
    torch.save({"state": module.state_dict(), "step": 3}, tmp_path / "good.pt")
    found = checkpoints.read_pickled_tensors(tmp_path / "good.pt")
    assert torch.equal(found["state"]["0.weight"], module[0].weight)
    torch.save({"w": Trap(tmp_path / "mark")}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="would run code"):
        checkpoints.read_pickled_tensors(tmp_path / "bad.pt")
    assert not (tmp_path / "mark").exists()
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoints.read_pickled_tensors(tmp_path / "cut.pt")
    with pytest.raises(FileNotFoundError, match="no file"):
        checkpoints.read_pickled_tensors(tmp_path / "none.pt")


def write_for_ever(path):
    module = nn.Linear(300, 300)
    step = 0
    while True:
        with torch.no_grad():
            module.weight.fill_(float(step))
        moments = torch.full((300, 300), float(step))
        save(path, module, step=step, training={"step": step, "moments": moments})
        step += 1


def test_death_while_writing_never_leaves_an_unreadable_checkpoint(tmp_path):
    delays = torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()
    steps = []
    for trial, delay in enumerate(delays):
        path = tmp_path / f"{trial}"
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path,))
        writer.start()
        while not (path / MANIFEST).exists():
            time.sleep(0.001)
        time.sleep(0.2 * delay)
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        found = checkpoints.load(path)
        state = found.training()
        assert found.step == state["step"] == int(found.weights["weight"][0, 0])
        assert torch.equal(state["moments"], found.weights["weight"])
        steps.append(found.step)
    assert len(set(steps)) > 1  # killed at different moments


def test_a_reader_beside_a_writer_sees_whole_checkpoints(tmp_path):
    path = tmp_path / "a"
    writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path,))
    writer.start()
    try:
        while not (path / MANIFEST).exists():
            time.sleep(0.001)
        found = [checkpoints.load(path) for _ in range(50)]
    finally:
        writer.kill()
        writer.join()
    assert all(c.step == int(c.weights["weight"][0, 0]) for c in found)
    assert found[-1].step > found[0].step
