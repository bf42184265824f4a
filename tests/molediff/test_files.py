import gzip
import json
import os
import random
import time

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDepictor, rdDistGeom

from molediff.files import read, write
from molediff.molecules import Molecule
from shared.checkpoints import whole
from shared.domains import Invalid

FUZZ = int(os.environ.get("MOLEDIFF_FUZZ", "600"))


def molecule(smiles, name="", properties=None):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=1)
    return Molecule.from_rdkit(mol).replace(name=name, properties=properties or {})


@pytest.fixture(scope="module")
def molecules():
    return [
        molecule("c1cc[nH]c1", "pyrrole", {"mu": 1.74, "id": 7, "code": "007"}),
        molecule("C[NH2+]CC(=O)[O-]", "sarcosine", {"mu": -2.5e-4, "id": 8, "code": "a b=c"}),
        molecule("FC(Cl)Br", "halo", {"mu": 0.0, "id": 9, "code": "x"}),
    ]


def valid(path):
    items = list(read(path))
    assert all(isinstance(item, Molecule) for item in items), items
    return items


@pytest.mark.parametrize("suffix", [".sdf", ".sdf.gz", ".xyz", ".extxyz.gz", ".pdb"])
def test_atoms_survive_writing_in_two_appends_and_reading(tmp_path, molecules, suffix):
    path = tmp_path / f"some{suffix}"
    assert write(path, molecules[:2]) == 2
    write(path, molecules[2:])
    for before, after in zip(molecules, valid(path), strict=True):
        np.testing.assert_array_equal(after.atomic_numbers, before.atomic_numbers)
        np.testing.assert_allclose(after.positions, before.positions, atol=6e-4)
        np.testing.assert_array_equal(after.charges, before.charges)
        assert after.name == before.name
        if "pdb" not in suffix:
            assert dict(after.properties) == dict(before.properties)
        if "sdf" in suffix:
            assert after.smiles() == before.smiles()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".smi"])
def test_graphs_survive_as_text(tmp_path, molecules, suffix):
    path = tmp_path / f"some{suffix}"
    write(path, molecules[:1])
    write(path, molecules[1:])
    for before, after in zip(molecules, valid(path), strict=True):
        assert (after.smiles(), after.name) == (before.smiles(), before.name)
        assert after.positions is None
        assert "smi" in suffix or after.properties["mu"] == before.properties["mu"]


def test_csv_refuses_a_property_it_has_no_column_for(tmp_path, molecules):
    write(tmp_path / "a.csv", molecules[:1])
    with pytest.raises(ValueError, match="no column for property 'new'"):
        write(tmp_path / "a.csv", [molecules[0].replace(properties={"new": 1})])


def test_v3000_is_read(tmp_path, molecules):
    mol = molecules[0].to_rdkit()
    (tmp_path / "a.sdf").write_text(Chem.MolToV3KMolBlock(mol) + "> <e>\n-1.5\n\n$$$$\n")
    (found,) = valid(tmp_path / "a.sdf")
    assert found.smiles() == "c1cc[nH]c1"
    assert found.properties == {"e": -1.5}


def test_far_coordinates_and_aromatic_nonsense_fit_into_sdf(tmp_path):
    far = Molecule(
        np.array([8, 1]), [[-9999.5, 0, 0], [-9998.5, 0, 0]], bonds=[[0, 1]], orders=[4]
    )
    write(tmp_path / "a.sdf", [far])
    (found,) = valid(tmp_path / "a.sdf")
    np.testing.assert_allclose(found.positions, far.positions, atol=1e-4)
    assert found.orders.tolist() == [4]
    with pytest.raises(ValueError, match="999 Angstrom"):
        write(tmp_path / "a.pdb", [far])


def test_hydrogens_left_out_are_implied_and_listed_ones_are_complete(tmp_path):
    ethanol = Chem.MolFromSmiles("CCO")
    rdDistGeom.EmbedMolecule(ethanol, randomSeed=1)
    (tmp_path / "heavy.sdf").write_text(Chem.MolToMolBlock(ethanol) + "$$$$\n")
    assert valid(tmp_path / "heavy.sdf")[0].hydrogens.tolist() == [3, 2, 1]
    whole = molecule("CCO")
    keep = np.arange(len(whole) - 1)  # without the hydroxyl hydrogen: an open valence
    bonds = whole.bonds.max(1) < len(keep)
    radical = Molecule(
        whole.atomic_numbers[keep],
        whole.positions[keep],
        bonds=whole.bonds[bonds],
        orders=whole.orders[bonds],
    )
    block = Chem.MolToMolBlock(radical.to_rdkit(sanitize=False)).replace("0  1  0", "0  0  0")
    (tmp_path / "open.sdf").write_text(block + "$$$$\n")
    assert valid(tmp_path / "open.sdf")[0].smiles() == "CC[O]"


def test_extended_xyz_columns_and_qm9_exponents(tmp_path):
    text = (
        '2\nLattice="9 0 0 0 9 0 0 0 9" Properties=id:I:1:species:S:1:pos:R:3:forces:R:3 '
        'energy=-1.5 tag="a b"\n1 O 0 0 1.2*^-5 9 9 9\n2 h 0 0 0.96 9 9 9\n'
    )
    (tmp_path / "a.xyz").write_text(text)
    (found,) = valid(tmp_path / "a.xyz")
    assert found.properties == {"energy": -1.5, "tag": "a b"}
    assert found.symbols == ["O", "H"]
    np.testing.assert_array_equal(found.positions[:, 2], [1.2e-5, 0.96])
    assert found.bonds is None


@pytest.mark.parametrize(
    ("comment", "name", "properties"),
    [
        ("Properties=species:S:1:pos:R:3", "", {}),
        ("N#CC=O", "N#CC=O", {}),  # a SMILES, no property CC
        ("2nd=1 e=-2", "", {"2nd": 1, "e": -2}),
    ],
)
def test_comments_of_xyz_are_names_or_pairs(tmp_path, comment, name, properties):
    (tmp_path / "a.xyz").write_text(f"1\n{comment}\nC 0 0 0\n")
    (found,) = valid(tmp_path / "a.xyz")
    assert (found.name, found.properties) == (name, properties)


def test_an_ion_without_a_name_comes_back_without_one(tmp_path):
    write(tmp_path / "a.xyz", [Molecule(np.array([11]), [[0, 0, 0]], [1])])
    (found,) = valid(tmp_path / "a.xyz")
    assert (found.name, found.charge) == ("", 1)
    (tmp_path / "b.xyz").write_text(
        "1\nProperties=species:S:1:pos:R:3:formal_charge:R:1\nNa 0 0 0 1.0\n"
    )
    assert valid(tmp_path / "b.xyz")[0].charge == 1


def test_values_of_sdf_may_begin_with_a_bracket(tmp_path, molecules):
    block = Chem.MolToMolBlock(molecules[0].to_rdkit())
    (tmp_path / "a.sdf").write_text(block + "> <IC50>\n>5\n\n> <a>\n1\n> <b>\n2\n\n$$$$\n")
    assert valid(tmp_path / "a.sdf")[0].properties == {"IC50": ">5", "a": 1, "b": 2}


def test_heights_make_a_record_that_calls_itself_flat_solid(tmp_path, molecules):
    block = Chem.MolToMolBlock(molecules[1].to_rdkit())
    assert "3D" in block
    (tmp_path / "a.sdf").write_text(block.replace("3D", "2D") + "$$$$\n")
    positions = valid(tmp_path / "a.sdf")[0].positions
    np.testing.assert_allclose(positions, molecules[1].positions, atol=1e-4)
    flat = Chem.MolFromSmiles("CCO")
    rdDepictor.Compute2DCoords(flat)
    (tmp_path / "b.sdf").write_text(Chem.MolToMolBlock(flat) + "$$$$\n")
    assert valid(tmp_path / "b.sdf")[0].positions is None


def test_elements_of_old_pdb_files_come_from_atom_names(tmp_path):
    names = ["HG11", " CA ", "HE21", "1HB ", "CL  ", "HG  ", " N  "]
    lines = [
        f"ATOM  {i:5d} {name} VAL A   1    {2.0 * i:8.3f}   0.000   0.000{' ':18}1CRN 17{i}"
        for i, name in enumerate(names)
    ]
    (tmp_path / "a.pdb").write_text("\n".join([*lines, "END\n"]))
    assert valid(tmp_path / "a.pdb")[0].symbols == ["H", "C", "H", "H", "Cl", "Hg", "N"]


def test_byte_order_marks_and_capital_suffixes(tmp_path, molecules):
    for name, text in (("a.xyz", "1\n\nC 0 0 0\n"), ("a.smi", "C\n"), ("a.csv", "smiles\nC\n")):
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
        assert valid(tmp_path / name)[0].symbols == ["C"]
    write(tmp_path / "A.SDF.GZ", molecules)
    write(tmp_path / "A.SDF.GZ", molecules)
    assert len(valid(tmp_path / "A.SDF.GZ")) == 6


BAD = {
    "nan.xyz": ("1\n\nC 0 0 nan\n", "finite"),
    "inf.xyz": ("1\n\nC 0 0 inf\n", "finite"),
    "far.xyz": ("1\n\nC 0 0 20000\n", "beyond"),
    "element.xyz": ("1\n\nXx 0 0 0\n", "unknown element 'Xx'"),
    "short.xyz": ("3\n\nC 0 0 0\n", "announces 3 atoms, has 1"),
    "column.xyz": ("1\n\nC 0 0\n", "lacks a column"),
    "none.xyz": ("0\n\n", "no atoms"),
    "text.xyz": ("hello\n", "expected a number of atoms"),
    "number.pdb": (
        "HETATM    1  C   UNL     1       x.000   0.000   0.000\nEND\n",
        "not a number",
    ),
    "end.sdf": ("a\n\n\n  1  0\n$$$$\n", "M  END"),
    "block.sdf": ("a\n\n\nnonsense\nM  END\n$$$$\n", "mol block"),
    "smiles.smi": ("C1CC\n", "not a SMILES"),
    "valence.smi": ("C(C)(C)(C)(C)C\n", "not a SMILES"),
    "column.csv": ("name,x\na,1\n", "no column 'smiles'"),
    "returns.csv": ("smiles,x\rC,1\rN,2\r", "new-line character"),
    "fields.csv": ("smiles,x\nC,1,2\n", "3 fields"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_reported_with_its_reason(tmp_path, name):
    text, reason = BAD[name]
    (tmp_path / name).write_text(text, newline="")
    (item,) = read(tmp_path / name)
    assert isinstance(item, Invalid)
    assert reason in item.reason
    assert item.record == f"{name}#1"


def test_good_records_around_a_bad_one_are_read(tmp_path):
    good = "1\n\nC 0 0 0\n"
    (tmp_path / "a.xyz").write_text(
        good + "3\n\nC 0 0 0\nC 1 0 0\n" + good + "junk\njunk\n" + good
    )
    kinds = [type(item) for item in read(tmp_path / "a.xyz")]
    assert kinds == [Molecule, Invalid, Molecule, Invalid, Molecule]


def test_a_file_that_cannot_be_read_at_all_is_one_clear_error(tmp_path):
    (tmp_path / "empty.sdf").touch()
    (tmp_path / "blank.xyz").write_text("\n\n")
    (tmp_path / "a.docx").write_text("x")
    for name, error, match in [
        ("", ValueError, "is a folder"),
        ("absent.sdf", FileNotFoundError, "no such file"),
        ("empty.sdf", ValueError, "is empty"),
        ("blank.xyz", ValueError, "holds no molecules"),
        ("a.docx", ValueError, "no molecule format '.docx'"),
    ]:
        with pytest.raises(error, match=match):
            list(read(tmp_path / name))


def test_a_damaged_archive_gives_its_whole_records_and_a_report(tmp_path, molecules):
    path = tmp_path / "a.sdf.gz"
    write(path, molecules)
    path.write_bytes(path.read_bytes()[:-20])
    kinds = [type(item) for item in read(path)]
    assert kinds == [Molecule, Molecule, Invalid]
    path.write_bytes(b"not gzip at all")
    assert "damaged" in next(iter(read(path))).reason


def test_a_last_record_without_the_end_of_its_line_is_whole(tmp_path, molecules):
    path = tmp_path / "a.sdf"
    write(path, molecules[:2])
    path.write_text(path.read_text().rstrip("\n"))
    write(path, molecules[2:])
    assert [m.name for m in valid(path)] == [m.name for m in molecules]


def test_a_table_has_the_properties_of_all_molecules(tmp_path, molecules):
    some = [
        molecules[0].replace(properties={"gap": 5.0}),
        molecules[1].replace(properties={"mu": 2.0}),
    ]
    write(tmp_path / "a.csv", some)
    found = [{k: m.properties.get(k) for k in ("gap", "mu")} for m in valid(tmp_path / "a.csv")]
    assert found == [{"gap": 5.0, "mu": None}, {"gap": None, "mu": 2.0}]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, molecules):
    path = tmp_path / "a.sdf"
    path.write_text("before")
    bare = Molecule(np.array([1, 1]), np.eye(3)[:2], np.zeros(2, np.int8))
    with pytest.raises(ValueError, match="bonds"), whole(tmp_path / "a.smi") as file:
        write(file, [*molecules, bare])
    with pytest.raises(ValueError, match="no molecule format"), whole(path) as file:
        write(file.with_suffix(".text"), molecules)
    assert [f.name for f in tmp_path.iterdir()] == ["a.sdf"]
    assert path.read_text() == "before"
    with whole(path) as file:
        write(file, molecules)
    assert [m.name for m in valid(path)] == [m.name for m in molecules]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("suffix", [".sdf", ".pdb"])
def test_a_record_cut_short_by_a_kill_is_removed_by_the_next_append(tmp_path, molecules, suffix):
    path = tmp_path / f"a{suffix}"
    write(path, molecules[:2])
    whole = path.stat().st_size
    write(path, molecules[2:])
    with open(path, "rb+") as file:
        file.truncate(whole + 100)
    write(path, molecules[2:])
    assert [m.name for m in valid(path)] == [m.name for m in molecules]
    path.write_text("half a record")
    with pytest.raises(ValueError, match="no whole record"):
        write(path, molecules)


def mutated(text, rng):
    """A few random edits: characters, digits, lines cut, doubled or swapped, tail lost."""
    lines = text.splitlines(keepends=True)
    for _ in range(rng.randint(1, 4)):
        k, kind = rng.randrange(len(lines)), rng.randrange(7)
        line = lines[k]
        at = rng.randrange(len(line) + 1)
        junk = rng.choice(["9", "-", "\0", "nan", "1e400", "\n", "é", " ", "99999999", "$$$$"])
        if kind == 0:
            lines[k] = line[:at] + junk + line[at + len(junk) :]
        elif kind == 1:
            lines[k] = line[:at] + junk + line[at:]
        elif kind == 2:
            lines[k] = line[:at]
        elif kind == 3 and len(lines) > 1:
            del lines[k]
        elif kind == 4:
            lines.insert(k, rng.choice(lines))
        elif kind == 5:
            lines[k] = (
                "".join(chr(rng.randrange(1, 256)) for _ in range(rng.randint(1, 80))) + "\n"
            )
        elif k > 0:
            lines = lines[:k]
    return "".join(lines)


def test_mutated_files_never_crash_or_hang(tmp_path, molecules):
    """Set MOLEDIFF_FUZZ=10000 for the long form."""
    v3000 = Chem.MolToV3KMolBlock(molecules[0].to_rdkit()) + "$$$$\n"
    (tmp_path / "v3.sdf").write_text(v3000)
    for name in ("v2.sdf", "plain.xyz"):
        write(tmp_path / name, molecules)
    seeds = [tmp_path / name for name in ("v2.sdf", "v3.sdf", "plain.xyz")]
    texts = [path.read_text() for path in seeds]
    rng, slowest, found = random.Random(0), 0.0, {Molecule: 0, Invalid: 0}
    refusals = []
    for i in range(FUZZ):
        path = tmp_path / f"fuzz{seeds[i % 3].suffix}"
        path.write_text(mutated(texts[i % 3], rng), encoding="utf-8")
        start = time.process_time()
        try:
            for item in read(path):
                found[type(item)] += 1
                if isinstance(item, Molecule):
                    assert np.abs(item.positions if item.positions is not None else 0).max() <= 1e4
                else:
                    json.dumps([item.record, item.reason])
        except ValueError as error:  # an edit may leave no record at all
            refusals.append(str(error))
        slowest = max(slowest, time.process_time() - start)
    assert slowest < 1.0
    assert all(r.endswith(("is empty", "holds no molecules")) for r in refusals)
    assert min(found.values()) > FUZZ // 10


def test_gzip_members_are_ordinary_gzip(tmp_path, molecules):
    write(tmp_path / "a.sdf", molecules)
    write(tmp_path / "a.sdf.gz", molecules)
    assert gzip.decompress((tmp_path / "a.sdf.gz").read_bytes()).count(b"$$$$") == 3
