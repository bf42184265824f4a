"""Pictures that are read one by one, and the square that a photograph becomes."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from shared.images.pictures import Files, Frame, Pictures, picture

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 4, 6), dtype=np.uint8)


def test_indexing_reads_what_is_asked_for():
    asked = []

    def read(row):
        asked.append(row)
        return IMAGES[row]

    pictures = Pictures(read, 5, np.arange(5))
    assert pictures.shape == (5, 4, 6)
    asked.clear()
    assert np.array_equal(pictures[1:3], IMAGES[1:3])
    assert asked == [1, 2]
    assert np.array_equal(pictures[np.array([4, 0])], IMAGES[[4, 0]])
    assert np.array_equal(pictures[np.arange(5) > 2], IMAGES[3:])
    asked.clear()
    some = pictures.at(np.array([3, 1]))
    assert asked == []
    assert some.labels.tolist() == [3, 1]
    assert np.array_equal(some[:], IMAGES[[3, 1]])


def test_a_picture_of_another_size_is_named():
    mixed = [IMAGES[0], IMAGES[1][:3]]
    with pytest.raises(ValueError, match=r"picture 1 is \[3, 6\].*domain.size=N"):
        Pictures(mixed.__getitem__, 2)[:]


def test_the_middle_square_is_taken():
    wide = np.zeros((8, 12, 3), dtype=np.uint8)
    wide[:, 2:10] = 100
    wide[:, [1, 10]] = 255  # just outside
    found = Frame(8)(Image.fromarray(wide))
    assert found.shape == (8, 8, 3)
    assert (found == 100).all()
    halved = Frame(4)(Image.fromarray(wide))
    assert halved.shape == (4, 4, 3)
    assert (halved == 100).all()


def test_halving_takes_means_and_a_crop_comes_first():
    image = RNG.integers(0, 256, (16, 16), dtype=np.uint8)
    means = image.reshape(8, 2, 8, 2).mean((1, 3))
    found = Frame(8, colour=False)(Image.fromarray(image))
    assert np.abs(found - means).max() <= 1
    inner = Frame(8, crop=8, colour=False)(Image.fromarray(image))
    assert np.array_equal(inner, image[4:12, 4:12])
    with pytest.raises(ValueError, match="16 x 16 is smaller than the square of 20"):
        Frame(8, crop=20)(Image.fromarray(image))
    with pytest.raises(ValueError, match=r"domain\.size=0"):
        Frame(0)


def test_small_pictures_are_enlarged():
    assert Frame(10)(Image.new("RGB", (3, 7), (9, 8, 7))).tolist() == [[[9, 8, 7]] * 10] * 10


def test_grey_pictures_become_colour_in_a_frame_of_colour(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    files = Files([str(tmp_path / "a.png")], Frame(4))
    found = pickle.loads(pickle.dumps(files))(0)
    assert found.shape == (4, 4, 3)
    assert np.array_equal(found[..., 0], IMAGES[0][:, 1:5])


def test_a_truncated_jpeg_is_named():
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    half = buffer.getvalue()[: buffer.tell() // 2]
    for frame in (None, Frame(8)):
        with pytest.raises(ValueError, match=r"face\.jpg is damaged"):
            picture(half, "face.jpg", frame)
