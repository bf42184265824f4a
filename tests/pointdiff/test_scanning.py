import numpy as np
import pytest

from pointdiff.scanning import Scanner, cameras, in_depth_image, unhidden


@pytest.fixture(scope="module")
def sphere():
    x = np.random.default_rng(0).normal(size=(4000, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("views", [26, 40])
def test_cameras_surround_the_object(views):
    found = cameras(views)
    assert found.shape == (views, 3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0)
    assert len(np.unique(found.round(9), axis=0)) == views
    assert np.linalg.norm(found.mean(0)) < 0.05
    assert ((found @ found.T) - 2 * np.eye(views)).max(1).min() > 0.7


@pytest.mark.parametrize("method", [unhidden, in_depth_image])
@pytest.mark.parametrize("direction", [[0, 0, 1.0], [0.48, -0.6, 0.64]])
def test_a_sphere_shows_its_near_side(sphere, method, direction):
    seen = method(sphere, 3 * np.array(direction))
    facing = sphere @ direction
    # the horizon is at cos = 1/3
    clear, hidden = np.flatnonzero(facing > 0.45), np.flatnonzero(facing < 0.1)
    assert np.isin(clear, seen).mean() > 0.97
    assert np.isin(hidden, seen).mean() < 0.01
    assert np.array_equal(seen, np.unique(seen))


@pytest.mark.parametrize(("method", "holes"), [("hull", 0.0), ("depth", 0.02)])
def test_what_is_inside_is_hidden_whatever_the_frame(sphere, method, holes):
    cloud = np.concatenate([sphere, 0.3 * sphere[:500]]) * 7 + 40
    scan = Scanner(points=500, method=method)(cloud, 0, 0)
    assert scan.shape == (500, 3)
    assert scan.dtype == np.float32
    radii = np.linalg.norm(scan - 40, axis=1)
    assert (np.abs(radii / 7 - 1) > 1e-3).mean() <= holes


def test_near_copies_of_points_are_no_finer_depth_image(sphere):
    camera = np.array([0, 0, 3.0])
    for gap in (0.0, 1e-7):
        seen = in_depth_image(np.concatenate([sphere, sphere + gap]), camera)
        once = in_depth_image(sphere, camera)
        assert abs(len(seen) - 2 * len(once)) < 0.02 * len(once)


def test_a_scan_is_a_function_of_seed_and_index(sphere):
    scanner = Scanner(points=300, noise=0.01, occlusion=0.2, crop=0.1)
    first = scanner(sphere, 3, 5)
    np.testing.assert_array_equal(first, scanner(sphere, 3, 5))
    for other in (scanner(sphere, 3, 6), scanner(sphere, 4, 5)):
        assert not np.array_equal(first, other)


def test_views_noise_occlusion_and_cropping(sphere):
    along = cameras()
    plain = Scanner(points=4000)(sphere, 0, 0, view=4)
    assert (plain @ along[4]).min() > 0.2
    noisy = Scanner(points=4000, noise=0.05)(sphere, 0, 0, view=4)
    error = noisy - plain
    assert 0.04 < error.std() * 3**0.5 < 0.06
    sight = plain - 3 * along[4]
    np.testing.assert_allclose(np.cross(error, sight), 0.0, atol=1e-4)
    whole = len(np.unique(plain, axis=0))
    for option in ("occlusion", "crop"):
        cut = Scanner(points=4000, **{option: 0.3})(sphere, 0, 0, view=4)
        assert abs(len(np.unique(cut, axis=0)) / whole - 0.7) < 0.01


def test_few_points_are_repeated_and_flat_clouds_scanned():
    flat = np.zeros((30, 3))
    flat[:, :2] = np.random.default_rng(1).normal(size=(30, 2))
    scan = Scanner(points=64)(flat, 0, 0)
    assert scan.shape == (64, 3)
    assert 1 < len(np.unique(scan, axis=0)) <= 30
    for n in (1, 2, 3):
        assert Scanner(points=8)(flat[:n], 0, 0).shape == (8, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lidar"}, "choose hull or depth"),
        ({"points": 0}, "at least 1"),
        ({"distance": 0.5}, "distance > 1"),
        ({"noise": float("nan")}, "noise >= 0"),
        ({"crop": 1.0}, "shares from 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Scanner(**options)


def test_a_view_that_is_not_there_is_refused(sphere):
    with pytest.raises(ValueError, match="views 0 to 25"):
        Scanner()(sphere, 0, 0, view=26)
