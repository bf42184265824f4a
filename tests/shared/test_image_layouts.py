"""Published layouts of data sets, rebuilt in small."""

from __future__ import annotations

import io
import pickle
import sys
import types

import numpy as np
import pytest
from PIL import Image

from shared.images import layouts
from shared.images.data import open_pictures
from shared.images.domain import Images

RNG = np.random.default_rng(0)


def save(path, level, size=(20, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


def levels(pictures):
    """The grey level of every picture; JPEG may be off by one."""
    return [int(round(pictures[i].mean() / 10)) * 10 for i in range(len(pictures))]


# -- CelebA -----------------------------------------------------------------------------------


@pytest.fixture
def celeba(tmp_path):
    parts = [0, 1, 2, 0]
    for k in range(4):
        save(tmp_path / "img_align_celeba" / f"{k:06}.jpg", 10 * (k + 1), (178, 218))
    lines = [f"{k:06}.jpg {part}" for k, part in enumerate(parts)]
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    marks = [f"{k:06}.jpg  {s} -1" for k, s in enumerate((1, -1, 1, -1))]
    text = "\n".join(["4", "Smiling Young", *marks])
    (tmp_path / "list_attr_celeba.txt").write_text(text + "\n")
    return tmp_path


def test_celeba_keeps_its_partition_and_leaves_out_the_test_part(celeba):
    domain = Images(str(celeba))
    assert domain.shape == (3, 64, 64)
    assert domain.classes == 0
    assert levels(domain.pictures) == [10, 20, 40]
    assert domain.held_out.tolist() == [False, True, False]
    train, held = domain.datasets()
    assert (len(train), len(held)) == (2, 1)
    assert open_pictures(str(celeba), size=32).shape == (3, 32, 32, 3)


def test_celeba_has_attributes(celeba):
    domain = Images(str(celeba), label="Smiling")
    assert domain.pictures.labels.tolist() == [1, 0, 0]
    assert domain.statistics()["class_counts"] == [2, 1]
    with pytest.raises(ValueError, match=r"label=Smilin is not.*did you mean 'Smiling'"):
        open_pictures(str(celeba), label="Smilin")


def test_celeba_cuts_out_140_pixels(celeba):
    face = np.full((218, 178, 3), 255, dtype=np.uint8)
    face[39:179, 19:159] = 50
    Image.fromarray(face).save(celeba / "img_align_celeba" / "000000.jpg", quality=100)
    assert int(open_pictures(str(celeba))[0].max()) < 70


def test_mistakes_in_celeba_are_named(celeba):
    (celeba / "img_align_celeba" / "000003.jpg").write_bytes(b"\xff\xd8rubbish")
    with pytest.raises(ValueError, match=r"000003\.jpg is damaged"):
        open_pictures(str(celeba))[2]
    (celeba / "list_eval_partition.txt").write_text("000000.jpg\n")
    with pytest.raises(ValueError, match=r"list_eval_partition\.txt, line 1: 1 words"):
        open_pictures(str(celeba))
    (celeba / "list_eval_partition.txt").write_text("000009.jpg 0\n")
    with pytest.raises(FileNotFoundError, match=r"000009\.jpg is in the list"):
        open_pictures(str(celeba))
    (celeba / "list_eval_partition.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"list_eval_partition\.txt is missing"):
        open_pictures(str(celeba))
    (celeba / "list_attr_celeba.txt").unlink()
    (celeba / "list_eval_partition.txt").write_text("000000.jpg 0\n")
    with pytest.raises(FileNotFoundError, match="label=Smiling"):
        open_pictures(str(celeba), label="Smiling")


# -- ImageNet ---------------------------------------------------------------------------------


@pytest.fixture
def imagenet(tmp_path):
    for k, name in enumerate(("n01443537", "n01440764")):
        for j in range(2):
            save(tmp_path / "train" / name / f"{name}_{j}.JPEG", 10 * (2 * k + j + 1), (30, 20))
    for k in (1, 2):
        save(tmp_path / "val" / f"ILSVRC2012_val_0000000{k}.JPEG", 100 * k)
    return tmp_path


SOLUTION = (
    "ImageId,PredictionString\n"
    "ILSVRC2012_val_00000002,n01440764 1 2 3 4 \n"
    "ILSVRC2012_val_00000001,n01443537 1 2 3 4 n01443537 5 6 7 8 \n"
)
NAMES = "ILSVRC2012_val_00000001.JPEG n01443537\nILSVRC2012_val_00000002.JPEG n01440764\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LOC_val_solution.csv", SOLUTION),
        ("val.txt", NAMES),
        ("val.txt", NAMES.replace("n01443537", "1").replace("n01440764", "0")),
    ],
)
def test_imagenet_with_a_flat_validation_folder(imagenet, name, text):
    (imagenet / name).write_text(text)
    domain = Images(str(imagenet), size=16)
    assert domain.shape == (3, 16, 16)
    assert levels(domain.pictures) == [30, 40, 10, 20, 100, 200]
    assert domain.pictures.labels.tolist() == [0, 0, 1, 1, 1, 0]
    assert domain.held_out.tolist() == [False] * 4 + [True] * 2


def test_imagenet_with_folders_or_without_validation(imagenet, tmp_path):
    for file in (imagenet / "val").iterdir():
        file.unlink()
    (imagenet / "val").rmdir()
    assert open_pictures(str(imagenet)).held is None
    assert open_pictures(str(imagenet)).shape == (4, 64, 64, 3)
    for name in ("n01443537", "n01440764"):
        save(imagenet / "val" / name / "a.JPEG", 90)
    pictures = open_pictures(str(imagenet))
    assert pictures.labels.tolist() == [0, 0, 1, 1, 0, 1]
    assert pictures.held.tolist() == [False] * 4 + [True] * 2


def test_mistakes_in_imagenet_are_named(imagenet):
    with pytest.raises(FileNotFoundError, match=r"put LOC_val_solution\.csv or val\.txt"):
        open_pictures(str(imagenet))
    (imagenet / "val.txt").write_text(NAMES.splitlines()[0])
    with pytest.raises(ValueError, match=r"val\.txt: nothing about ILSVRC2012_val_00000002"):
        open_pictures(str(imagenet))
    (imagenet / "val.txt").write_text(NAMES.replace("n01440764", "2"))
    with pytest.raises(ValueError, match="an unknown class '2'"):
        open_pictures(str(imagenet))
    with pytest.raises(ValueError, match=r"label=x: ImageNet has no labels to choose"):
        open_pictures(str(imagenet), label="x")
    for file in (imagenet / "train" / "n01440764").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"n01440764: no \.png"):
        open_pictures(str(imagenet))


# -- ImageNet in few pixels -------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_downsampled_imagenet(tmp_path, compressed):
    images = RNG.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    labels = np.array([1, 1000, 3, 4, 5, 6, 7])
    write = np.savez_compressed if compressed else np.savez
    for name, rows in (("train_data_batch_2", [2, 3]), ("train_data_batch_1", [0, 1])):
        flat = images[rows].transpose(0, 3, 1, 2).reshape(2, -1)
        write(tmp_path / f"{name}.npz", data=flat, labels=labels[rows], mean=flat.mean(0))
    flat = images[4:].transpose(0, 3, 1, 2).reshape(3, -1)
    write(tmp_path / "val_data.npz", data=flat, labels=labels[4:])
    pictures = open_pictures(str(tmp_path))
    assert np.array_equal(pictures[:], images)
    assert pictures.labels.tolist() == [0, 999, 2, 3, 4, 5, 6]
    assert pictures.held.tolist() == [False] * 4 + [True] * 3
    stored = layouts.mapped(tmp_path / "val_data.npz", "data")
    assert (stored is None) == compressed
    with pytest.raises(ValueError, match="one size already"):
        open_pictures(str(tmp_path), size=4)
    write(tmp_path / "val_data.npz", data=flat[:, :-1], labels=labels[4:])
    with pytest.raises(ValueError, match=r"val_data\.npz: uint8 \[3, 191\] is no batch"):
        open_pictures(str(tmp_path))
    (tmp_path / "val_data.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"val_data\.npz is damaged"):
        open_pictures(str(tmp_path))


# -- LSUN -------------------------------------------------------------------------------------


def jpeg(level, size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(buffer, "JPEG")
    return buffer.getvalue()


class FakeDatabase:
    """What the reader asks of the package lmdb."""

    Error = OSError
    content = {b"b1": jpeg(20), b"b0": jpeg(10)}
    opened = 0

    @classmethod
    def open(cls, path, **options):
        assert options["readonly"]
        assert not options["lock"]
        cls.opened += 1
        return cls()

    def begin(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def cursor(self):
        return self

    def iternext(self, keys, values):
        return iter(sorted(self.content))

    def get(self, key):
        return self.content[key]


def test_lsun_by_a_stand_in_for_lmdb(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").touch()
    monkeypatch.setitem(sys.modules, "lmdb", FakeDatabase)
    assert open_pictures(str(tmp_path)).shape == (2, 256, 256, 3)
    pictures = open_pictures(str(tmp_path), size=16)
    assert levels(pictures) == [10, 20]
    before = FakeDatabase.opened
    copied = pickle.loads(pickle.dumps(pictures.read))
    assert copied(1).shape == (16, 16, 3)
    assert FakeDatabase.opened == before + 1  # databases do not survive in another process
    monkeypatch.setitem(FakeDatabase.content, b"b1", b"rubbish")
    with pytest.raises(ValueError, match="picture b1 is damaged"):
        pictures[1]


def test_lsun_by_lmdb(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    with (
        lmdb.open(str(tmp_path), map_size=1 << 20) as environment,
        environment.begin(write=True) as access,
    ):
        for key, value in FakeDatabase.content.items():
            access.put(key, value)
    assert levels(open_pictures(str(tmp_path), size=16)) == [10, 20]
    (tmp_path / "data.mdb").write_bytes(b"rubbish" * 1000)
    with pytest.raises(ValueError, match="damaged or no database"):
        open_pictures(str(tmp_path))


@pytest.mark.parametrize(
    ("module", "data"), [("lmdb", "{}"), ("datasets", "hf:mnist"), ("datasets", "hf:{}")]
)
def test_missing_packages_are_named(tmp_path, monkeypatch, module, data):
    (tmp_path / "data.mdb").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{module}: pip install 'molediff\[images\]'"):
        open_pictures(data.format(tmp_path))


# -- Hugging Face -----------------------------------------------------------------------------


def fake_hub():
    """What the reader asks of the package datasets."""
    image, label = type("Image", (), {}), type("ClassLabel", (), {})

    class Rows(list):
        features = {"picture": image(), "kind": label(), "id": object()}

        def __getitem__(self, key):
            if isinstance(key, str):
                return [row[key] for row in self]
            return super().__getitem__(key)

    def rows(n):
        return Rows({"picture": Image.new("L", (6, 4), 10 * k), "kind": k % 2} for k in range(n))

    module = types.SimpleNamespace(DatasetDict=type("DatasetDict", (dict,), {}))
    splits = module.DatasetDict(train=rows(4), test=rows(2))
    module.load_dataset = lambda name, split: splits[split]
    module.load_from_disk = lambda path: splits
    return module


def test_hugging_face_by_a_stand_in_for_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", fake_hub())
    pictures = open_pictures("hf:mine")
    assert pictures.shape == (4, 4, 6)
    assert pictures.labels.tolist() == [0, 1, 0, 1]
    assert levels(open_pictures("hf:mine:test", size=3)) == [0, 10]
    (tmp_path / "dataset_dict.json").touch()
    assert open_pictures(str(tmp_path), size=3).shape == (4, 3, 3)
    with pytest.raises(ValueError, match="label=id: classes are kind"):
        open_pictures("hf:mine", label="id")
    with pytest.raises(ValueError, match="hf:mine:dev cannot be opened"):
        open_pictures("hf:mine:dev")


def test_hugging_face_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    content = {"image": [Image.new("RGB", (6, 4), (k, k, k)) for k in (10, 20)], "y": [1, 0]}
    features = datasets.Features(
        {"image": datasets.Image(), "y": datasets.ClassLabel(names=["a", "b"])}
    )
    datasets.Dataset.from_dict(content, features=features).save_to_disk(str(tmp_path / "one"))
    domain = Images(f"{tmp_path}/one", validation=0.5)
    assert domain.shape == (3, 4, 6)
    assert domain.pictures.labels.tolist() == [1, 0]
    assert levels(domain.pictures) == [10, 20]
    with pytest.raises(ValueError, match="cannot be opened"):
        open_pictures(f"hf:{tmp_path}")
