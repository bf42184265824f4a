import json
from pathlib import Path

import numpy as np
import pytest
import torch

import pointdiff
from pointdiff.metrics import chamfer


def distance(a, b):
    return float(chamfer(*(torch.from_numpy(x.astype(np.float32))[None] for x in (a, b))))


@pytest.fixture(scope="module")
def completer():
    return pointdiff.load()


def test_the_shipped_model_has_a_card_and_is_small():
    folder = Path(pointdiff.__file__).parent / "pretrained" / "shapes"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 16 * 2**20
    assert "Limits" in (folder / "README.md").read_text()
    config = json.loads((folder / "checkpoint.json").read_text())["config"]
    assert config["domain"]["data"] is None
    assert set(config) == {"domain", "model", "schedule", "trainer"}


def test_half_of_a_box_gets_another_half_in_its_own_units(completer):
    rng = np.random.default_rng(0)
    box = rng.uniform(-1, 1, (2000, 3))
    box[np.arange(2000), rng.integers(3, size=2000)] = rng.choice([-1, 1], 2000)
    box = box * [300, 200, 250] + [1000, -500, 70]
    scan = box[(box - [1000, -500, 70]) @ [1, 1, 1] > 0]
    full = completer.complete(scan, points=512, steps=8, seed=0)[0]
    assert full.shape == (512, 3)
    assert distance(full, box) < distance(scan, box)
    reach = np.percentile(np.abs(full - [1000, -500, 70]), 90, axis=0)
    assert (reach < [450, 300, 375]).all()
    moved = completer.complete(scan / 1000 - 3, points=512, steps=8, seed=0)[0]
    np.testing.assert_allclose(moved, full / 1000 - 3, atol=2e-3)
    some = completer.complete(scan, 2, points=64, steps=4, seed=1)
    assert not np.allclose(some[0], some[1])


def test_a_scan_where_the_whole_is_normalised_is_completed_in_that_frame(completer):
    rng = np.random.default_rng(1)
    rod = rng.normal(size=(3000, 3))
    rod *= [1.0, 0.2, 0.3] / np.linalg.norm(rod, axis=1, keepdims=True)
    scan = rod[rod[:, 0] < 0.1]
    assert completer.frame(scan) == "given"
    full = completer.complete(scan, points=512, steps=8, seed=0)[0]
    own = completer.complete(scan, points=512, steps=8, seed=0, frame="own")[0]
    assert distance(full, rod) < 0.5 * distance(scan, rod)
    assert distance(full, rod) < distance(own, rod)
