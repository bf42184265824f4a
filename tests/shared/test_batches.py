"""Batches are functions of their number."""

from __future__ import annotations

import pytest
import torch

from shared.batches import Batches, Share
from shared.domains import Batch
from shared.geometry import CentredPoints, Points
from shared.process import Field, Process
from shared.schedules import VPLinear

SCHEDULE = VPLinear()
PROCESS = Process({"x": Field(SCHEDULE, CentredPoints()), "h": Field(SCHEDULE, Points())})


class Sets:
    """Records: point sets of 1 to 7 points, shifted at random when they are read."""

    name = "sets"

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.full((1 + index % 7, 3), float(index)), torch.rand(())

    def collate(self, records):
        nodes = max(len(points) for points, _ in records)
        x, mask = torch.zeros(len(records), nodes, 3), torch.zeros(len(records), nodes).bool()
        for row, (points, shift) in enumerate(records):
            x[row, : len(points)], mask[row, : len(points)] = points + shift, True
        return Batch({"x": x, "h": x[..., :1]}, mask)


def batches(count=10, size=4, **changes):
    sets = Sets(count)
    return Batches(sets, PROCESS, sets, size, **{"seed": 3, **changes})


def indices(noisy):
    return noisy.batch.state["x"][:, 0, 0].floor().long().tolist()


def test_a_share_holds_the_rows_of_the_whole_batch():
    whole = batches()[5]
    for rank in range(2):
        part = batches(share=Share(rank, 2))[5]
        rows = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(part.u, whole.u[rows])
        for name in ("x", "h"):
            nodes = part.batch.mask.shape[1]  # padded less than the whole batch
            for ours, theirs in (
                (part.batch.state, whole.batch.state),
                (part.noise, whole.noise),
            ):
                torch.testing.assert_close(ours[name], theirs[name][rows, :nodes])
                assert not theirs[name][rows, nodes:].any()


def test_a_batch_is_the_same_in_every_loader_process():
    plain = list(batches().loader(range(2, 6)))
    busy = list(batches().loader(range(2, 6), workers=2))
    for a, b in zip(plain, busy, strict=True):
        assert torch.equal(a.batch.state["x"], b.batch.state["x"])
        assert torch.equal(a.noise["x"], b.noise["x"])
        assert torch.equal(a.u, b.u)


def test_a_pass_holds_every_record_once_and_passes_differ():
    found = [index for number in range(10) for index in indices(batches()[number])]
    passes = [found[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4
    assert found != [i for n in range(10) for i in indices(batches(seed=4)[n])]
    in_order = batches(shuffle=False, name="validation")
    assert indices(in_order[1]) == [4, 5, 6, 7]


def test_times_fill_every_stratum_once():
    u = torch.stack([batches(size=8)[number].u for number in range(3)])
    assert torch.equal((u * 8).floor().sort(1).values, torch.arange(8).double().expand(3, 8))
    assert len(u.flatten().unique()) == 24
    assert not torch.equal(u[0].argsort(), u[1].argsort())


def test_random_augmentation_repeats_and_leaves_the_caller_alone():
    before = torch.random.get_rng_state()
    first, second = batches()[0].batch.state["x"], batches()[0].batch.state["x"]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, second)
    shifts = first[:, 0, 0] % 1
    assert len(shifts.unique()) == 4
    later = {i: float(v % 1) for b in (3, 4) for i, v in _shifts(batches()[b])}
    assert all(later.get(i, -1.0) != s for i, s in _shifts(batches()[0]))  # new in the next pass


def _shifts(noisy):
    values = noisy.batch.state["x"][:, 0, 0]
    return [(int(v), float(v % 1)) for v in values]


def test_training_and_validation_draw_different_noise():
    train, validation = batches(shuffle=False), batches(shuffle=False, name="validation")
    assert not torch.equal(train[0].noise["x"], validation[0].noise["x"])


def test_noise_lies_on_the_geometry():
    noisy = batches()[0]
    assert noisy.noise["x"].sum(1).abs().max() < 1e-5
    assert not noisy.noise["h"][~noisy.batch.mask].any()


def test_impossible_batches_are_named():
    with pytest.raises(ValueError, match="4 samples do not divide among 3 processes"):
        batches(share=Share(0, 3))
    with pytest.raises(ValueError, match="domain sets: the train set is empty"):
        batches(count=0)


def test_records_of_equal_length_share_batches_and_all_are_seen():
    sets = Sets(700)
    sets.lengths = [1 + index % 7 for index in range(700)]
    grouped = Batches(sets, PROCESS, sets, 32, seed=3)
    turn = 700 // 32
    seen, mixed = set(), 0
    for number in range(3 * turn):
        rows = [grouped._index(number * 32 + row) for row in range(32)]
        assert len(set(rows)) == 32
        seen |= set(rows)
        mixed += len({sets.lengths[row] for row in rows}) > 1
    assert len(seen) > 690  # 28 of 700 are left out in each of three passes
    assert mixed <= 3 * 6
    order = [sets.lengths[grouped._index(number * 32)] for number in range(turn)]
    assert order != sorted(order)
