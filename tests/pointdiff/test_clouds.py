import numpy as np
import pytest

from pointdiff.clouds import Frame, check, resample


@pytest.fixture
def points():
    return np.random.default_rng(0).normal(size=(50, 3))


def test_a_good_cloud_becomes_float32(points):
    assert check(points).dtype == np.float32
    np.testing.assert_allclose(check(points.tolist()), points, rtol=1e-6)
    np.testing.assert_allclose(check(points + 1e4), points + 1e4, atol=1e-3)
    assert check([[0.1, 0.2, 1e5 / 3]], least=1).shape == (1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:0], "no points"),
        (lambda x: x[:3], "3 points, at least 16"),
        (lambda x: np.zeros_like(x), "all 50 points are equal"),
        (lambda x: np.where(np.arange(50)[:, None] == 7, np.nan, x), "1 of 50 points .* finite"),
        (lambda x: x * np.inf, "not finite"),
        (lambda x: x * 1e12, "rescale"),
        (lambda x: x + [5e5, 4.2e6, 0], "up to 4.2e[+]06 in a cloud of size .* move it"),
        (lambda x: x[:, :2], r"\[points, 3\]"),
        (lambda x: x.astype(str), "needs numbers"),
        (lambda x: np.tile(x[:8], (9, 1)), "72 points .8 distinct., at least 16"),
        (lambda x: np.zeros((1_000_000, 3), np.float32), "1,000,000 points, at most 500,000"),
    ],
)
def test_bad_clouds_are_refused_in_one_sentence(points, change, message):
    with pytest.raises(ValueError, match=message) as error:
        check(change(points), "scan.ply")
    assert str(error.value).startswith("scan.ply: ")


def test_duplicates_are_kept_dropped_or_refused(points):
    twice = np.concatenate([points, points[:5]])
    assert len(check(twice)) == 55
    np.testing.assert_array_equal(check(twice, duplicates="drop"), points.astype(np.float32))
    with pytest.raises(ValueError, match="5 of 55 points are duplicates"):
        check(twice, duplicates="refuse")
    with pytest.raises(ValueError, match="choose keep, drop or refuse"):
        check(twice, duplicates="maybe")


def test_a_frame_fits_and_is_undone(points):
    frame = Frame.of(points * 7 + 100)
    inside = frame.enter(points * 7 + 100)
    np.testing.assert_allclose(np.linalg.norm(inside, axis=1).max(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(inside.min(0) + inside.max(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(frame.leave(inside), points * 7 + 100, rtol=1e-5)


def test_resampling_gives_the_number_asked_for(points):
    few, many = (resample(points, n, np.random.default_rng(1)) for n in (20, 80))
    assert len(np.unique(few, axis=0)) == len(few) == 20
    assert len(many) == 80
    assert len(np.unique(many, axis=0)) == 50
