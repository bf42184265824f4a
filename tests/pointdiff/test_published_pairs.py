import h5py
import numpy as np
import pytest

from pointdiff import published
from pointdiff.domain import Completion
from pointdiff.files import write_one
from pointdiff.scanning import Scanner

RNG = np.random.default_rng(0)


def cloud(n=40):
    return RNG.uniform(-0.5, 0.5, (n, 3)).astype(np.float32)


def domain(folder, **options):
    return Completion(str(folder), points=32, scan=Scanner(points=24), frame="data", **options)


def check(made, expected, scan):
    """Points of the pair are those of the clouds, twice as large."""
    for part, source in ((made.complete, expected), (made.partial[:, :3], scan)):
        rows = {tuple(row) for row in (2 * source).astype(np.float32)}
        assert {tuple(row) for row in part} <= rows


def test_mvp_scans_have_their_clouds(tmp_path):
    truth, scans = RNG.random((2, 2, 50, 3)), RNG.random((2, 52, 30, 3))
    for part in ("train", "test"):
        with h5py.File(tmp_path / f"mvp_{part}_input.h5", "w") as file:
            file["incomplete_pcds"], file["novel_incomplete_pcds"] = scans
        with h5py.File(tmp_path / f"mvp_{part}_gt_2048pts.h5", "w") as file:
            file["complete_pcds"], file["novel_complete_pcds"] = truth
        with h5py.File(tmp_path / f"mvp_{part}_gt_4096pts.h5", "w") as file:
            file["complete_pcds"], file["novel_complete_pcds"] = truth + 7
    found = published.find(tmp_path, "train")
    assert len(found) == 104
    complete, scan = found.pair(52 + 27, 100)
    np.testing.assert_allclose(complete, 2 * truth[1, 1], rtol=1e-6)
    np.testing.assert_allclose(scan, 2 * scans[1, 27], rtol=1e-6)
    assert found.pair(0, 3000)[0].min() > 13
    made = domain(tmp_path)
    training, validation = made.datasets()
    # one of the four clouds is held out with all its scans
    assert (len(training), len(validation), len(made.test)) == (78, 26, 104)
    held = {int(group) for group in validation.recorded.groups}
    assert len(held) == 1
    assert held.isdisjoint(training.recorded.groups)
    complete = validation.recorded.pair(3, 100)[0]
    np.testing.assert_allclose(complete, 2 * truth.reshape(4, 50, 3)[held.pop()], rtol=1e-6)
    check(made.test[30], truth[0, 1], scans[0, 30])
    assert made.statistics()["points"] == 32


def test_mvp_in_one_file_and_what_can_be_wrong_with_it(tmp_path):
    path = tmp_path / "MVP_Train_CP.h5"
    with h5py.File(path, "w") as file:
        file["incomplete_pcds"], file["complete_pcds"] = (
            RNG.random((26, 9, 3)),
            RNG.random((1, 9, 3)),
        )
    assert len(published.find(tmp_path, "train")) == 26
    assert published.find(tmp_path, "test") is None
    for name, key, message in (
        ("a", "complete", "no array 'complete_pcds'; it has complete, incomplete_pcds"),
        ("b", "complete_pcds", "2 clouds of 2048 points for 26 scans"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        with h5py.File(folder / path.name, "w") as file:
            file["incomplete_pcds"], file[key] = RNG.random((26, 9, 3)), RNG.random((2, 9, 3))
        with pytest.raises(ValueError, match=message):
            published.find(folder, "train")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / path.name).write_bytes(b"no hdf5")
    with pytest.raises(ValueError, match="no readable HDF5 file"):
        published.find(tmp_path / "c", "train")


def write_h5(path, points):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["data"] = points


def test_completion3d(tmp_path):
    scans, truth = cloud(), cloud()
    for part in ("train", "val"):
        write_h5(tmp_path / part / "partial" / "02691156" / "a.h5", scans)
        write_h5(tmp_path / part / "gt" / "02691156" / "a.h5", truth)
    training, validation = domain(tmp_path).datasets()
    assert len(training) == len(validation) == 1
    check(training[0], truth, scans)
    (tmp_path / "train" / "gt" / "02691156" / "a.h5").unlink()
    with pytest.raises(ValueError, match="its complete cloud .* is missing"):
        domain(tmp_path).datasets()


def test_a_part_that_is_missing_is_taken_from_the_other_or_named(tmp_path):
    for part in ("train", "val"):
        for kind in ("partial", "gt"):
            write_h5(tmp_path / "a" / part / kind / "02691156" / "a.h5", cloud())
    assert len(domain(tmp_path / "a").test) == 1
    write_h5(tmp_path / "a" / "test" / "partial" / "all" / "b.h5", cloud())  # as published
    write_h5(tmp_path / "a" / "test" / "partial" / "all" / "c.h5", cloud())
    assert len(domain(tmp_path / "a").test) == 1
    (tmp_path / "b").mkdir()
    with h5py.File(tmp_path / "b" / "MVP_Train_CP.h5", "w") as file:
        file["incomplete_pcds"], file["complete_pcds"] = RNG.random((26, 9, 3)), [cloud(9)]
    with pytest.raises(ValueError, match="b: no scans of the part valid"):
        domain(tmp_path / "b").datasets()
    (tmp_path / "b" / "MVP_Train_CP.h5").rename(tmp_path / "b" / "MVP_Test_CP.h5")
    assert len(domain(tmp_path / "b").test) == 26
    with pytest.raises(ValueError, match="no scans of the part train"):
        domain(tmp_path / "b").datasets()


def test_pcn(tmp_path):
    scans, truth = [cloud(), cloud()], cloud()
    for part in ("train", "val", "test"):
        folder = tmp_path / part
        (folder / "partial" / "02691156" / "a").mkdir(parents=True)
        (folder / "complete" / "02691156").mkdir(parents=True)
        for i, scan in enumerate(scans):
            write_one(folder / "partial" / "02691156" / "a" / f"0{i}.pcd", scan)
        write_one(folder / "complete" / "02691156" / "a.pcd", truth)
    made = domain(tmp_path)
    assert len(made.datasets()[0]) == 2
    check(made.test[1], truth, scans[1])


def test_shapenet55_is_scanned(tmp_path):
    for folder in ("shapenet_pc", "ShapeNet-55"):
        (tmp_path / folder).mkdir()
    for name in "abc":
        np.save(tmp_path / "shapenet_pc" / f"{name}.npy", cloud(60) * 3)
    (tmp_path / "ShapeNet-55" / "train.txt").write_text("a.npy\nb.npy\n")
    (tmp_path / "ShapeNet-55" / "test.txt").write_text("c.npy\n")
    made = domain(tmp_path, validation=0.5)
    assert len(made.datasets()[0]) == len(made.datasets()[1]) == len(made.test) == 1
    assert np.linalg.norm(made.shapes[0], axis=1).max() == pytest.approx(1, rel=1e-5)
    (tmp_path / "shapenet_pc" / "b.npy").unlink()
    with pytest.raises(ValueError, match=r"b.npy is missing"):
        domain(tmp_path).datasets()
