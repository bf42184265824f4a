"""The verb `imagediff prepare`."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from shared.cli import main
from shared.images.cli import PROGRAM
from shared.images.data import open_pictures
from shared.images.domain import Images


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(6):
        folder = tmp_path / "photos" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (10 + k, 14, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return tmp_path / "photos"


def test_photographs_become_arrays_that_read_the_same(photographs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(PROGRAM, ["prepare", str(photographs), "size=8", f"out={out}"]) == 0
    assert "6 pictures of 8 x 8" in capsys.readouterr().out
    lazily, mapped = open_pictures(str(photographs), 8), open_pictures(str(out))
    assert np.array_equal(lazily[:], mapped[:])
    assert mapped.labels.tolist() == [0, 0, 0, 1, 1, 1]
    records = Images(str(out), validation=0.3).datasets()[0]
    assert records[0]["x"].shape == (3, 8, 8)
    assert main(PROGRAM, ["prepare", str(photographs), "size=8", f"out={out}"]) == 2
    assert "prepared already" in capsys.readouterr().err
    np.save(out / "labels.npy", np.zeros(2))
    with pytest.raises(ValueError, match=r"labels\.npy: \(2,\) for 6 images"):
        open_pictures(str(out))


def test_a_damaged_picture_leaves_nothing_that_looks_whole(photographs, tmp_path, capsys):
    (photographs / "b" / "5.png").write_bytes(b"\x89PNG")
    out = tmp_path / "out"
    assert main(PROGRAM, ["prepare", str(photographs), "size=8", f"out={out}"]) == 2
    assert "5.png is damaged" in capsys.readouterr().err
    assert not (out / "images.npy").exists()


def test_pictures_of_several_sizes_need_one(photographs, tmp_path, capsys):
    assert main(PROGRAM, ["prepare", str(photographs), f"out={tmp_path / 'out'}"]) == 2
    assert "domain.size=N" in capsys.readouterr().err
    assert main(PROGRAM, ["prepare", str(photographs), "size=8"]) == 2
    assert "out=FOLDER" in capsys.readouterr().err
