import csv
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from molediff.files import write
from molediff.geometric.data import MoleculeData
from molediff.geometric.prepare import prepare, random_split, without_hydrogens
from molediff.geometric.sources import (
    EV_PER_HARTREE,
    QM9_UNITS,
    embed,
    parse_qm9,
    qm9_edm_split,
    read_uncharacterized,
)
from molediff.molecules import Molecule

PROPERTIES = (
    "157.7118 157.70997 157.70699 0. 13.21 -0.3877 0.1171 0.5048 35.3641 0.044749 "
    "-40.47893 -40.476062 -40.475117 -40.498597 6.469"
)
METHANE = f"""5
gdb 1\t{PROPERTIES}\t
C\t-0.0126981359\t 1.0858041578\t 0.0080009958\t-0.535689
H\t 0.002150416\t-0.0060313176\t 0.0019761204\t 0.133921
H\t 1.0117308433\t 1.4637511618\t 2.7657*^-4\t 0.133922
H\t-0.540815069\t 1.4475266138\t-0.8766437152\t 0.133923
H\t-0.5238136345\t 1.4379326443\t 0.9063972942\t 0.133923
1341.307\t1341.3284\t1341.365\t1562.6731\t1562.7453\t3038.3205\t3151.6034\t3151.6788\t3151.7078
C\tC
InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4
"""


def molecule(smiles, name="", seed=1, **properties):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=seed)
    return Molecule.from_rdkit(mol).replace(name=name, properties=properties)


@pytest.fixture
def sdf(tmp_path):
    """Ten molecules, three conformers each, one damaged; gap known for all but the first."""

    def labels(k):
        return {"id": k, "gap": 0.5 * k} if k else {"id": k}

    path = tmp_path / "mine.sdf"
    molecules = [
        molecule("C" * (1 + k % 5) + "ON"[k % 2], f"m{k}", seed, **labels(k))
        for k in range(10)
        for seed in (1, 2, 3)
    ]  # fmt: skip
    write(path, molecules)
    text = path.read_text().split("$$$$\n")
    text[4] = text[4].replace("M  END", "M  EDN")
    path.write_text("$$$$\n".join(text))
    return path


@pytest.fixture
def data(sdf, tmp_path):
    return prepare(sdf, tmp_path / "data", units={"gap": "eV"}, fractions=(0.6, 0.2, 0.2))


def test_everything_of_the_source_is_there(data, sdf):
    assert len(data) == 29
    assert data.elements == (1, 6, 7, 8)
    assert data.property_names == ("id", "gap")
    first, last = data[0], data[28]
    expected = molecule("CO", seed=1)
    np.testing.assert_array_equal(first.atomic_numbers, expected.atomic_numbers)
    np.testing.assert_allclose(first.positions, expected.positions, atol=1e-4)
    assert first.positions.dtype == np.float32
    assert first.name == "1"
    assert np.isnan(first.properties["gap"])
    assert (last.properties["id"], last.properties["gap"]) == (9.0, 4.5)
    assert data.smiles()[0] == "CO"
    assert sum(data.histogram().values()) == 29
    assert data.info["source"]["path"] == "mine.sdf"


def test_records_left_out_are_listed_with_reasons(data):
    (line,) = (data.path / "invalid.jsonl").read_text().splitlines()
    assert json.loads(line)["record"] == "mine.sdf#5"
    assert "M  END" in json.loads(line)["reason"]
    assert data.info["invalid"]["count"] == 1


def test_conformers_of_a_molecule_stay_in_one_split(data):
    parts = {name: data.subset(name) for name in ("train", "valid", "test")}
    assert sum(len(p) for p in parts.values()) == 29
    smiles = {name: set(p.smiles()) for name, p in parts.items()}
    assert not smiles["train"] & smiles["valid"]
    assert not smiles["train"] & smiles["test"]
    assert data.info["splits"] == {name: len(p) for name, p in parts.items()}
    with pytest.raises(ValueError, match="expected one of train, valid, test"):
        data.subset("dev")


def test_statistics_are_of_known_training_values(data):
    gap = data.subset("train").column("gap")
    gap = gap[np.isfinite(gap)]
    row = data.statistics["gap"]
    assert row["unit"] == "eV"
    assert row["n"] == len(gap) < 29
    assert row["mean"] == pytest.approx(gap.mean())
    assert row["mad"] == pytest.approx(np.abs(gap - gap.mean()).mean())
    histogram = {int(n): c for n, c in data.info["histogram"].items()}
    assert histogram == data.subset("train").histogram()
    with pytest.raises(ValueError, match="no property 'mu'; it has id, gap"):
        data.column("mu")


def test_preparing_again_does_nothing_and_something_else_is_refused(data, sdf):
    same = {"units": {"gap": "eV"}, "fractions": (0.6, 0.2, 0.2)}
    before = (data.path / "positions.npy").stat().st_mtime_ns
    prepare(sdf, data.path, **same)
    assert (data.path / "positions.npy").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds something else"):
        prepare(sdf, data.path, **same, seed=1)
    (sdf.parent / "mine").mkdir()
    (sdf.parent / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        prepare(sdf, sdf.parent / "mine", **same)


def test_a_failure_leaves_nothing_behind(tmp_path, sdf):
    (tmp_path / "bad.xyz").write_text("1\n\nXx 0 0 0\n")
    with pytest.raises(ValueError, match="no molecule that can be used: unknown element"):
        prepare(tmp_path / "bad.xyz", tmp_path / "out")
    with pytest.raises(ValueError, match="no record has a number 'mu'"):
        prepare(sdf, tmp_path / "out", properties=["mu"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.xyz", "mine.sdf"]


@pytest.mark.parametrize(
    ("name", "match"),
    [("absent", "no such"), ("a.pickle", "unpickling"), ("a.doc", "format"), ("a.tar", "unpack")],
)
def test_sources_that_cannot_be_read(tmp_path, name, match):
    if name == "a.tar":
        with tarfile.open(tmp_path / name, "w") as archive:
            archive.addfile(tarfile.TarInfo("x.xyz"))
    elif name != "absent":
        (tmp_path / name).write_text("x")
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        prepare(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize(
    "wrong", [{"fractions": (0.5, 0.1, 0.1)}, {"limit": 0}, {"conformers": 0}]
)
def test_wrong_options_are_named(sdf, tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        prepare(sdf, tmp_path / "out", **wrong)


def test_choices_of_conformers_hydrogens_limit_and_properties(sdf, tmp_path):
    one = prepare(sdf, tmp_path / "one", conformers=1, properties=["gap"], hydrogens=False)
    assert len(one) == 10
    assert one.property_names == ("gap",)
    assert 1 not in one.elements
    assert one.info["excluded"] == 19
    assert len(prepare(sdf, tmp_path / "few", limit=4)) == 4
    assert prepare(sdf, tmp_path / "word", properties="gap").property_names == ("gap",)


def test_hydrogens_taken_off_are_remembered():
    bare = without_hydrogens(molecule("CCO"))
    assert bare.hydrogens.tolist() == [3, 2, 1]
    assert bare.smiles() == "CCO"
    assert without_hydrogens(molecule("[H][H]")).reason.startswith("nothing is left")


def test_smiles_are_embedded_with_hydrogens_and_their_stereo_marks(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("smiles,logp\nC[C@H](O)F,0.4\nC[C@@H](O)F,0.4\nnonsense,1\n")
    data = prepare(path, tmp_path / "data")
    assert len(data) == 2
    assert data[0].properties["logp"] == 0.4
    assert len(data[0]) == 9
    chirality = []
    for item in data:
        center = item.positions[1]
        arms = [item.positions[k] - center for k in (0, 2, 3)]
        chirality.append(np.sign(np.linalg.det(np.stack(arms))))
    assert chirality[0] == -chirality[1]
    assert "not a SMILES" in (data.path / "invalid.jsonl").read_text()
    first = embed(Molecule.from_rdkit(Chem.MolFromSmiles("CCO")), seed=3)
    again = embed(Molecule.from_rdkit(Chem.MolFromSmiles("CCO")), seed=3)
    np.testing.assert_array_equal(first.positions, again.positions)


def test_random_splits_have_the_shares_and_follow_the_seed():
    split = random_split(np.arange(1000), (0.8, 0.1, 0.1), 0)
    assert np.bincount(split).tolist() == [800, 100, 100]
    np.testing.assert_array_equal(split, random_split(np.arange(1000), (0.8, 0.1, 0.1), 0))
    assert (split != random_split(np.arange(1000), (0.8, 0.1, 0.1), 1)).any()
    assert random_split(np.zeros(4), (1.0, 0.0, 0.0), 0).tolist() == [0] * 4


def test_data_survive_workers(data):
    again = pickle.loads(pickle.dumps(data.subset("train")))
    assert len(again) == len(data.subset("train"))
    np.testing.assert_array_equal(again[2].positions, data.subset("train")[2].positions)
    with pytest.raises(FileNotFoundError, match="prepare one"):
        MoleculeData(data.path.parent / "nowhere")


def test_qm9_text_has_units_exponents_and_the_relaxed_smiles():
    methane = parse_qm9(METHANE)
    assert methane.symbols == ["C", "H", "H", "H", "H"]
    assert methane.positions[2, 2] == pytest.approx(2.7657e-4)
    assert methane.properties["homo"] == pytest.approx(-0.3877 * EV_PER_HARTREE)
    assert (methane.properties["mu"], methane.properties["alpha"]) == (0.0, 13.21)
    assert methane.properties["smiles"] == "C"
    for broken in ("", METHANE[:150], METHANE.replace("gdb", "xyz")):
        with pytest.raises(ValueError, match="QM9 xyz|complete"):
            parse_qm9(broken)


def list_of_ids(path, ids):
    rows = [f"{i:7d}  C#N  C#N  0.1" for i in ids]
    path.write_text("\n".join(["heading 3054"] * 9 + rows + ["-----", ""]))


@pytest.mark.parametrize("kind", ["folder", "tar", "sdf"])
def test_published_qm9_layouts(tmp_path, kind):
    ids = np.arange(100, 100 + 3054)
    folder = tmp_path / "raw"
    folder.mkdir()
    texts = {g: METHANE.replace("gdb 1\t", f"gdb {g}\t") for g in (1, 2, 150)}
    texts[3] = "nothing"
    if kind == "folder":
        for g, text in texts.items():
            (folder / f"dsgdb9nsd_{g:06d}.xyz").write_text(text)
    elif kind == "tar":
        with tarfile.open(folder / "3195389", "w:bz2") as archive:
            for g, text in texts.items():
                member = tarfile.TarInfo(f"dsgdb9nsd_{g:06d}.xyz")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
    else:
        write(folder / "gdb9.sdf", [molecule("C", f"gdb_{g}") for g in (1, 2)])
        with open(folder / "gdb9.sdf", "a") as file:
            file.write("nothing\n$$$$\n")
        write(folder / "gdb9.sdf", [molecule("C", "gdb_150")])
        with open(folder / "gdb9.sdf.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["mol_id", *QM9_UNITS, "u0_atom"])
            for g in (1, 2, 3, 150):
                rows.writerow([f"gdb_{g}", *[-0.3877] * len(QM9_UNITS), 0])
    source = folder / "3195389" if kind == "tar" else folder
    with pytest.raises(ValueError, match="list of uncharacterized"):
        prepare(source, tmp_path / "data")
    list_of_ids(folder / "uncharacterized.txt", ids)
    data = prepare(source, tmp_path / "data")
    assert data.record.tolist() == [1, 2]  # 150 is on the list, 3 cannot be read
    assert (data.info["excluded"], data.info["invalid"]["count"]) == (1, 1)
    assert data[0].properties["homo"] == pytest.approx(-0.3877 * EV_PER_HARTREE)
    assert data.statistics["alpha"]["unit"] == "bohr^3"
    np.testing.assert_array_equal(data.split, qm9_edm_split(ids)[[1, 2]])


@pytest.mark.parametrize("share", [0.8, 0.951])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2"])
def test_half_an_archive_of_qm9_is_refused(tmp_path, mode, share):
    list_of_ids(tmp_path / "uncharacterized.txt", range(100, 100 + 3054))
    noise = np.random.default_rng(0).integers(33, 126, (40, 30_000), dtype=np.uint8)
    with tarfile.open(tmp_path / "qm9.tar", mode) as archive:
        for g, tail in enumerate(noise, start=1):
            content = METHANE.encode() + tail.tobytes()
            member = tarfile.TarInfo(f"dsgdb9nsd_{g:06d}.xyz")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    whole = (tmp_path / "qm9.tar").read_bytes()
    (tmp_path / "qm9.tar").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"qm9\.tar is damaged"):
        prepare(tmp_path / "qm9.tar", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_an_archive_cut_inside_a_header_is_refused(tmp_path):
    list_of_ids(tmp_path / "uncharacterized.txt", range(100, 100 + 3054))
    with tarfile.open(tmp_path / "qm9.tar", "w") as archive:
        for g in (1, 2):
            member = tarfile.TarInfo(f"dsgdb9nsd_{g:06d}.xyz")
            member.size = len(METHANE)
            archive.addfile(member, io.BytesIO(METHANE.encode()))
    first = 512 + -(-len(METHANE) // 512) * 512
    whole = (tmp_path / "qm9.tar").read_bytes()
    for part in (whole[: first + 100], whole[:first] + b"x" + whole[first + 1 :]):
        (tmp_path / "qm9.tar").write_bytes(part)
        with pytest.raises(ValueError, match="damaged"):
            prepare(tmp_path / "qm9.tar", tmp_path / "data")


def test_files_without_a_gdb_index_are_reported(tmp_path):
    list_of_ids(tmp_path / "uncharacterized.txt", range(100, 100 + 3054))
    for name in ("dsgdb9nsd_000001.xyz", "dsgdb9nsd_999999.xyz", "dsgdb9nsd_2.xyz"):
        (tmp_path / name).write_text(METHANE)
    data = prepare(tmp_path, tmp_path / "data")
    assert data.record.tolist() == [1]
    assert (data.info["excluded"], data.info["invalid"]["count"]) == (0, 2)


def test_the_list_of_uncharacterized_molecules_must_be_whole(tmp_path):
    list_of_ids(tmp_path / "a.txt", range(1, 3054))
    with pytest.raises(ValueError, match="3053 rows|3054"):
        read_uncharacterized(tmp_path / "a.txt")
    (tmp_path / "plain.txt").write_text("\n".join(str(i) for i in range(5, 5 + 3054)))
    assert read_uncharacterized(tmp_path / "plain.txt")[0] == 5


def test_edm_split_of_qm9_is_reproduced(data_folder):
    with np.load(data_folder("qm9/split_ids.npz")) as ids:
        split = qm9_edm_split(ids["uncharacterized"])
        for k, name in enumerate(("train", "valid", "test")):
            np.testing.assert_array_equal(np.nonzero(split == k)[0], np.sort(ids[name]))
        assert (split[ids["uncharacterized"]] == -1).all()


def test_compact_qm9_loads_directly(data_folder, tmp_path):
    data = prepare(data_folder("qm9/geometries.npz").parent, tmp_path / "qm9", limit=300)
    assert len(data) == 300
    assert data.elements == (1, 6, 7, 8)
    assert data[0].symbols == ["C", "H", "H", "H", "H"]
    assert data.record[:5].tolist() == [1, 2, 3, 4, 5]
    assert data.smiles()[3] == "C#C"
    with np.load(data_folder("qm9/properties.npz")) as labels:
        known = {int(i): v for i, v in zip(labels["gdb_index"], labels["values"], strict=True)}
        names = labels["names"].tolist()
    for item in data:
        expected = known.get(int(item.name), np.full(len(names), np.nan))
        assert item.properties["mu"] == pytest.approx(expected[names.index("mu")], nan_ok=True)
        gap = expected[names.index("gap")] * EV_PER_HARTREE
        assert item.properties["gap"] == pytest.approx(gap, nan_ok=True)
