import os
import time

import numpy as np
import pytest

from pointdiff import pcd
from pointdiff.files import read, read_one, sample_surface, write, write_one
from pointdiff.ply import write_vertices
from shared.domains import Invalid

FUZZ = int(os.environ.get("MOLEDIFF_FUZZ", "600"))


@pytest.fixture
def points():
    return np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


@pytest.mark.parametrize("suffix", [".ply", ".pcd", ".xyz", ".txt", ".npy", ".npz", ".h5"])
@pytest.mark.parametrize("ascii", [False, True])
def test_a_cloud_survives_being_written_in_blocks(tmp_path, points, suffix, ascii):
    if suffix == ".h5":
        pytest.importorskip("h5py")
    path = tmp_path / f"cloud{suffix}"
    assert write_one(path, (points[i : i + 7] for i in range(0, 40, 7)), ascii=ascii) == 40
    np.testing.assert_array_equal(read_one(path), points)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply_of_every_byte_order(tmp_path, points, form):
    write_vertices(tmp_path / "a.ply", [points], form)
    np.testing.assert_array_equal(read_one(tmp_path / "a.ply"), points)


@pytest.mark.parametrize("order", ["<", ">"])
def test_other_elements_and_properties_of_a_ply_are_passed_over(tmp_path, points, order):
    name = {"<": "little", ">": "big"}[order]
    header = (
        f"ply\nformat binary_{name}_endian 1.0\ncomment made by hand\nelement camera 2\n"
        "property list uchar int ids\nproperty float f\nelement vertex 40\nproperty uchar red\n"
        "property double x\nproperty double y\nproperty float nx\nproperty double z\nend_header\n"
    ).encode()
    kinds = {"r": "u1", "x": "f8", "y": "f8", "n": "f4", "z": "f8"}
    rows = np.zeros(40, [(name, order + kind) for name, kind in kinds.items()])
    rows["x"], rows["y"], rows["z"] = points.T
    cameras = b""
    for ids in ([1, 2, 3], []):
        cameras += bytes([len(ids)]) + np.array(ids, order + "i4").tobytes() + b"\0\0\0\0"
    (tmp_path / "a.ply").write_bytes(header + cameras + rows.tobytes())
    np.testing.assert_array_equal(read_one(tmp_path / "a.ply"), points)


def test_many_clouds_grow_an_npy_file(tmp_path, points):
    path = tmp_path / "samples.npy"
    write(path, [points, points + 1])
    write(path, [points[:30], points])
    found = list(read(path))
    assert [len(x) for x in found] == [40, 40, 30, 40]
    np.testing.assert_array_equal(found[1], points + 1)
    with pytest.raises(ValueError, match="holds one cloud"):
        write(tmp_path / "a.ply", [points, points])


def test_integers_are_scaled_and_bad_rows_do_not_hide_good_ones(tmp_path):
    whole = np.arange(2 * 5 * 3, dtype=np.int16).reshape(2, 5, 3)
    whole[0] = 3
    np.savez(tmp_path / "a.npz", points=whole, scale=np.float32(0.5))
    bad, good = read(tmp_path / "a.npz")
    assert isinstance(bad, Invalid)
    assert "all 5 points are equal" in bad.reason
    np.testing.assert_allclose(good, whole[1] * 0.5)


OCTAHEDRON = "\n".join(
    ["OFF", "6 8 0", "1 0 0", "-1 0 0", "0 1 0", "0 -1 0", "0 0 1", "0 0 -1"]
    + [f"3 {a} {b} {c}" for a in (0, 1) for b in (2, 3) for c in (4, 5)]
)


@pytest.mark.parametrize("suffix", [".off", ".obj", ".stl", ".ply"])
def test_meshes_are_sampled_on_their_surface(tmp_path, suffix):
    trimesh = pytest.importorskip("trimesh")
    (tmp_path / "a.off").write_text(OCTAHEDRON)
    if suffix != ".off":
        trimesh.load_mesh(tmp_path / "a.off", process=False).export(tmp_path / f"a{suffix}")
    cloud = read_one(tmp_path / f"a{suffix}", surface=4000)
    assert cloud.shape == (4000, 3)
    np.testing.assert_allclose(np.abs(cloud).sum(1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(cloud, read_one(tmp_path / f"a{suffix}", surface=4000))
    octants = np.bincount(((cloud > 0) * [1, 2, 4]).sum(1), minlength=8)
    assert np.abs(octants - 500).max() < 5 * np.sqrt(500)


FACES = (
    "ply\nformat %s 1.0\nelement vertex %d\nproperty float x\nproperty float y\nproperty float z\n"
    "element face %d\nproperty uchar red\nproperty list uchar int vertex_indices\n"
    "property list uchar float texcoord\nend_header\n"
)
CORNERS = np.array([[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0], [3, 0.5, 0]])
POLYGONS = ([0, 1, 2, 3], [1, 4, 2], [0, 1])


def mesh(form, vertices=5, faces=3, polygons=POLYGONS):
    """A rectangle, a triangle and an edge, with other properties around the corners."""
    out = (FACES % (form, vertices, faces)).encode()
    order = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}[form]
    if not order:
        rows = [" ".join(map(str, row)) for row in CORNERS]
        rows += [" ".join(map(str, [9, len(p), *p, 2, 0.5, 0.5])) for p in polygons]
        return out + "\n".join(rows).encode() + b"\n"
    out += CORNERS.astype(order + "f4").tobytes()
    for p in polygons:
        out += bytes([9, len(p)]) + np.array(p, order + "i4").tobytes() + bytes([2])
        out += np.array([0.5, 0.5], order + "f4").tobytes()
    return out


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_faces_of_a_ply_may_have_any_number_of_corners(tmp_path, form):
    path = tmp_path / "a.ply"
    path.write_bytes(mesh(form))
    cloud = read_one(path, surface=5000)
    assert abs((cloud[:, 0] > 2).mean() - 0.2) < 0.03
    assert abs((cloud[:, 0] < 1).mean() - 0.4) < 0.03
    assert cloud.max(0) == pytest.approx([3, 1, 0], abs=0.1)
    header, _, data = mesh(form).partition(b"end_header\n")
    lines = header.splitlines()
    lines = [*lines[:2], *lines[6:], *lines[2:6], b"end_header\n"]
    split = len(b"".join(data.splitlines(keepends=True)[:5])) if form == "ascii" else 60
    swapped = data[split:] + data[:split]
    path.write_bytes(b"\n".join(lines) + swapped)
    np.testing.assert_array_equal(read_one(path, surface=5000), cloud)
    for content, message in (
        (mesh(form, faces=4), "face 3 of 4"),
        (mesh(form, faces=10**9), "announces 5 points and 1,000,000,000 faces"),
        (mesh(form, vertices=10**9), "announces 1,000,000,000 points"),
        (mesh(form, polygons=([0, 1, 5], *POLYGONS[:2])), "beyond its 5 vertices"),
        (
            mesh(form).replace(b"int vertex_indices", b"int vertex_strips"),
            "no list vertex_indices",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_one(path)


def test_what_is_no_array_is_said_so(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("data")
    np.save(tmp_path / "b.npy", np.zeros((5, 3)))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    for name, message in (("a.h5", "data is no array"), ("b.npz", "no .npz archive")):
        with pytest.raises(ValueError, match=message):
            read_one(tmp_path / name)


def test_large_faces_get_more_points():
    triangles = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[5, 0, 0], [8, 0, 0], [5, 3, 0.0]]])
    points = sample_surface(triangles, 10_000)
    assert abs((points[:, 0] > 4).mean() - 0.9) < 0.02
    for flat in (triangles[:0], np.zeros((2, 3, 3)), triangles * np.nan):
        with pytest.raises(ValueError, match="mesh without"):
            sample_surface(flat, 10)


HEADER = b"ply\nformat ascii 1.0\nelement vertex %s\n"
PROPERTIES = b"property float x\nproperty float y\nproperty float z\nend_header\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ply", b"", "first line is not 'ply'"),
        ("a.ply", HEADER % b"5" + PROPERTIES + b"0 0 0\n" * 4, "announces 5|point 4 has 0"),
        ("a.ply", HEADER % b"400000" + PROPERTIES + b"0 0 0\n", "announces 400,000 points"),
        ("a.ply", HEADER % b"999999999" + PROPERTIES, "999,999,999 points, at most"),
        ("a.ply", HEADER % b"-5" + PROPERTIES, "a header line it cannot have"),
        ("a.ply", HEADER % b"5" + PROPERTIES[:40], "does not end|cannot have"),
        ("a.ply", HEADER % b"1" + b"property float x\nend_header\n1\n", "no plain coordinates"),
        ("a.ply", HEADER % b"0" + PROPERTIES, "no points"),
        ("a.ply", HEADER % b"2" + PROPERTIES + b"0 0 nan\n0 0 1\n", "not finite"),
        ("a.ply", b"ply\nelement vertex 1\n" + PROPERTIES + b"0 0 0\n", "no format line"),
        ("a.pcd", b"VERSION 0.7\nDATA ascii\n", "no FIELDS, POINTS, SIZE, TYPE"),
        ("a.xyz", b"1 2 3\n4 5\n", "row 1 has 2 values"),
        ("a.xyz", b"", "no points"),
        ("a.xyz", b"a b c\n", "could not convert"),
        ("a.npy", b"no array", "magic string"),
        ("a.npz", b"no zip", "no .npz archive"),
        ("a.off", b"OFF\n0 0 0\n", "a.off"),
    ],
)
def test_damaged_files_are_one_clear_error(tmp_path, name, content, message):
    if name == "a.off":
        pytest.importorskip("trimesh")
    (tmp_path / name).write_bytes(content)
    (item,) = read(tmp_path / name)
    assert isinstance(item, Invalid)
    with pytest.raises(ValueError, match=message):
        read_one(tmp_path / name)


def test_missing_arrays_are_named_with_what_is_there(tmp_path, points):
    np.savez(tmp_path / "a.npz", clouds=points)
    with pytest.raises(ValueError, match=r"no array named points or .* but clouds"):
        read_one(tmp_path / "a.npz")
    np.testing.assert_array_equal(read_one(tmp_path / "a.npz", key="clouds"), points)
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["labels"] = np.zeros(3)
    with pytest.raises(ValueError, match="no array named .* but labels"):
        read_one(tmp_path / "a.h5")


def test_paths_that_do_not_fit(tmp_path, points):
    with pytest.raises(ValueError, match="is a folder"):
        read_one(tmp_path)
    with pytest.raises(FileNotFoundError, match="no files .ply"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "none.ply")
    (tmp_path / "a.pdf").write_text("")
    with pytest.raises(ValueError, match="clouds are read from"):
        read(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="clouds are written to"):
        write_one(tmp_path / "b.pdf", points)
    write_one(tmp_path / "b.ply", points)
    write_one(tmp_path / "a.xyz", points + 1)
    first, second = read(tmp_path)
    np.testing.assert_array_equal(second, points)
    write(tmp_path / "c.npy", [points, points])
    with pytest.raises(ValueError, match="several clouds"):
        read_one(tmp_path / "c.npy")


def test_mutated_ply_files_neither_crash_nor_hang(tmp_path, points):
    path, rng, refused = tmp_path / "a.ply", np.random.default_rng(5), 0
    originals = []
    for form in ("ascii", "binary_little_endian", "binary_big_endian"):
        write_vertices(path, [points], form)
        originals.append(path.read_bytes().replace(b"vertex 0000000000", b"vertex "))
    originals += [mesh("ascii"), mesh("binary_little_endian"), mesh("binary_big_endian")]
    for number in range(FUZZ):
        data = bytearray(originals[number % len(originals)])
        for _ in range(rng.integers(1, 6)):
            # half of the changes hit the header
            place = rng.integers(0, len(data) if rng.random() < 0.5 else 130)
            match rng.integers(4):
                case 0:
                    data[place] = rng.integers(256)
                case 1:
                    del data[place : place + rng.integers(1, 30)]
                case 2:
                    data[place:place] = rng.bytes(rng.integers(1, 9))
                case 3:
                    data[place] = ord("0") + rng.integers(10)
            data = data or bytearray(b"p")
        path.write_bytes(data)
        start = time.process_time()
        items = list(read(path))
        assert time.process_time() - start < 10
        assert len(items) == 1
        refused += isinstance(items[0], Invalid)
        if not isinstance(items[0], Invalid):
            assert np.isfinite(items[0]).all()
    assert FUZZ // 4 < refused < FUZZ


def compressed(array):
    """By LibLZF, which h5py holds."""
    h5py = pytest.importorskip("h5py")
    with h5py.File("x", "w", driver="core", backing_store=False) as file:
        made = file.create_dataset("x", data=array, chunks=array.shape, compression="lzf")
        mask, data = made.id.read_direct_chunk((0,) * array.ndim)
    assert mask == 0  # else it was not compressed
    return data


@pytest.mark.parametrize("n", [1, 3, 300, 70_000])
def test_repetitions_are_unpacked(n):
    raw = np.tile(np.frombuffer(b"point clouds, points", np.uint8), n) + (np.arange(20 * n) // 999)
    raw = raw.astype(np.uint8)
    assert pcd.unpacked(compressed(raw) if n > 1 else b"\x13" + raw.tobytes(), 20 * n) == bytes(
        raw
    )


def packed_pcd(points, data=None, n=None):
    """Fields x, colour (three bytes), y, z, one field after the other."""
    fields = [points[:, 0], np.zeros((len(points), 3), np.uint8), points[:, 1], points[:, 2]]
    raw = np.frombuffer(b"".join(np.ascontiguousarray(f).tobytes() for f in fields), np.uint8)
    data = compressed(raw) if data is None else data
    n = len(points) if n is None else n
    return (
        b"VERSION 0.7\nFIELDS x colour y z\nSIZE 4 1 4 4\nTYPE F U F F\nCOUNT 1 3 1 1\n"
        b"WIDTH %d\nHEIGHT 1\nPOINTS %d\nDATA binary_compressed\n" % (n, n)
        + len(data).to_bytes(4, "little") + len(raw).to_bytes(4, "little") + data
    )  # fmt: skip


def test_compressed_pcd_files_are_read(tmp_path):
    points = (np.random.default_rng(0).integers(0, 9, (500, 3)) / 4).astype(np.float32)
    (tmp_path / "a.pcd").write_bytes(packed_pcd(points))
    np.testing.assert_array_equal(read_one(tmp_path / "a.pcd"), points)
    good = compressed(np.zeros(7500, np.uint8))
    for data, n in (
        (None, 499),
        (good[:-1], None),
        (b"\xff\xff" + good[2:], None),
        (b"", None),
        (b"\xff" * 99, None),
    ):
        (tmp_path / "a.pcd").write_bytes(packed_pcd(points, data, n))
        (bad,) = read(tmp_path / "a.pcd")
        assert "announces" in bad.reason or "damaged" in bad.reason
    content = packed_pcd(points)
    (tmp_path / "a.pcd").write_bytes(content[:-9])
    (bad,) = read(tmp_path / "a.pcd")
    assert "announces" in bad.reason


def test_folders_in_folders_and_columns_beside_the_coordinates(tmp_path, points):
    (tmp_path / "chair" / "train").mkdir(parents=True)
    np.save(tmp_path / "chair" / "train" / "a.npy", np.concatenate([points, points], 1))
    write_one(tmp_path / "b.ply", points + 1)
    found = list(read(tmp_path))
    np.testing.assert_allclose(found[0], points + 1, rtol=1e-5)
    np.testing.assert_allclose(found[1], points, rtol=1e-5)
