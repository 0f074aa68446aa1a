import numpy as np
import pytest

from formarium import create
from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of

pytest.importorskip("rdkit")
from formarium.tasks.molecule_generation.chemistry import (
    canonical,
    decode,
    encode,
    fingerprints,
    made,
    qed,
    repair,
    sanitised,
    similarities,
)
from formarium.tasks.molecule_generation.data import Prepare, read, read_file
from formarium.tasks.molecule_generation.metrics import set_scores
from formarium.tasks.molecule_generation.model import CHEMBL_ATOMS, CHEMBL_BONDS, Molecules

task = task_of("molecule-generation")
KEKULE = CHEMBL_BONDS[:4]
SMILES = ["CCO", "c1ccccc1C(=O)NC", "CC#N", "O=C(O)c1ccncc1", "C1CC1Cl"]


@pytest.mark.parametrize("bonds", [CHEMBL_BONDS, KEKULE], ids=["aromatic", "kekulised"])
@pytest.mark.parametrize("smiles", SMILES)
def test_molecules_survive_the_way_there_and_back(smiles, bonds):
    atoms, links = encode(smiles, CHEMBL_ATOMS, bonds, 12)
    assert (links == links.T).all() and links.shape == (12, 12)
    assert made(atoms, links, CHEMBL_ATOMS, bonds)[0] == canonical(smiles)


@pytest.mark.parametrize(
    ("smiles", "said"),
    [
        ("C1CC", "refuses"),
        ("C(C)(C)(C)(C)C", "refuses"),
        ("", "refuses"),
        ("C" * 13, "at most 12"),
        ("C[Se]C", "elements"),
        ("C->[Pt]", "elements"),
    ],
)
def test_what_can_not_be_encoded_is_refused_in_one_line(smiles, said):
    with pytest.raises(BadInput, match=said) as e:
        encode(smiles, CHEMBL_ATOMS, CHEMBL_BONDS, 12)
    assert "\n" not in str(e.value)


def test_the_lower_half_counts_and_the_largest_part():
    atoms, links = np.array([3, 3, 3, 0, 5]), np.zeros((5, 5), np.int64)
    links[1, 0] = 1
    links[0, 2] = 2  # the upper half: not seen
    places = (0, 5, 7, 6, 9, 8)
    assert made(atoms, links, places, KEKULE)[0] == "CC"
    links[3, 1] = 1  # padding that is bonded is a carbon
    assert made(atoms, links, places, KEKULE)[0] == "CCC"
    assert made(np.zeros(5, np.int64), np.zeros((5, 5), np.int64), places, KEKULE) == ("", "")


def test_repair_takes_bonds_from_atoms_that_have_too_many():
    atoms, links = np.full(6, 1), np.zeros((6, 6), np.int64)
    links[1:, 0] = 1  # a carbon with five neighbours
    links[2, 0] = 2
    smiles, repaired = made(atoms, links, (0, 6), KEKULE)
    assert smiles == "" and sanitised(repair(decode(atoms, links, (0, 6), KEKULE))) != "" and repaired == canonical("CC(C)(C)C")
    ring = np.zeros((5, 5), np.int64)
    for i in range(5):
        ring[i, (i + 1) % 5] = ring[(i + 1) % 5, i] = 4
    assert made(np.full(5, 1), ring, (0, 6), CHEMBL_BONDS) == ("", "C1CCCC1")  # five aromatic carbons can't be kekulised


def test_files(tmp_path):
    (tmp_path / "molecules.smi").write_text("CCO ethanol\nC1CC bad\nCCN\n" + "C" * 50 + "\nCCCC\nOCC\n")
    (tmp_path / "target.csv").write_text("name,smiles\na,CC(=O)N\nb,CC(=O)NC\n")
    data = read(tmp_path)
    assert data.model_args == {"atoms": (0, 6, 7, 8), "bonds": ("ZERO", "SINGLE", "DOUBLE"), "max_atoms": 5}
    assert len(data.splits["train"]) + len(data.splits["val"]) == 3 and len(data.notes) == 2  # ethanol is there once
    assert len(data.splits["train"][0]["targets"]) == 2
    with pytest.raises(BadInput, match="refuses"):
        read(tmp_path, strict=True)
    alone = read(tmp_path / "molecules.smi")
    assert "targets" not in alone.splits["train"][0]
    for path, options in [("nowhere", {}), ("target.csv", {"target": tmp_path / "no.smi"}), ("target.csv", {"max_atoms": 2})]:
        with pytest.raises(BadInput) as e:
            read(tmp_path / path, **options)
        assert "\n" not in str(e.value)


def test_sample_data():
    data = task.sample("fragments")
    assert len(data.splits["train"]) == 400 and len(data.splits["val"]) == 100 and data.model_args["max_atoms"] <= 17
    assert not {*data.splits["train"].smiles} & {*data.splits["val"].smiles}
    assert create("druggen_micro").config.atoms == data.model_args["atoms"]
    amide = canonical("CC(=O)NC")
    assert similarities(fingerprints([amide]), fingerprints([*data.splits["train"].targets])).mean() > 0.1
    with pytest.raises(UnknownName):
        task.sample("chembl")


def test_inputs(tmp_path):
    (tmp_path / "in.smi").write_text("SMILES\nCCO\n")
    assert [s["smiles"] for s in task.inputs([tmp_path / "in.smi", "CCN"])] == ["CCO", "CCN"]
    with pytest.raises(BadInput):
        task.inputs([tmp_path / "no.smi"])
    prepare = Prepare({"atoms": CHEMBL_ATOMS, "bonds": KEKULE, "max_atoms": 9})
    batch = task.collate([prepare(s, np.random.default_rng(0)) for s in task.inputs(["CCO", "CCN"])])
    assert batch["atoms"].shape == (2, 9) and batch["smiles"] == ["CCO", "CCN"]
    from rdkit import Chem

    assert task.from_memory(Chem.MolFromSmiles("OCC"), 0)["smiles"] == "CCO"


def said(smiles):
    import torch

    return Molecules(smiles, smiles, torch.tensor([s != "" for s in smiles]), torch.zeros(len(smiles), 1), torch.zeros(len(smiles), 1, 1))


def test_scores():
    batch = {"smiles": ["CCO", "CCO", "CCN", "CCC"], "target_smiles": ["CCF"] * 4, "known": ("CCO",), "id": list("abcd")}
    metrics, each = task.score([said(["CCO", "CCO", "CCF", ""])], [batch])
    assert metrics["validity"] == 0.75 and each["validity"].tolist() == [1, 1, 1, 0]
    assert metrics["uniqueness"] == pytest.approx(2 / 3) and metrics["novelty"] == 0.5 and metrics["changed"] == pytest.approx(1 / 3)
    assert metrics["valid_unique_novel"] == 0.25 == each["valid_unique_novel"].mean()  # CCF alone
    assert task.score([said(batch["smiles"])], [batch])[0]["valid_unique_novel"] == 0  # whoever gives back its input
    assert 0 < metrics["qed"] < 1 and 0 < metrics["internal_diversity"] < 1
    assert set_scores(["CCF"], ["CCO"], ["CCF"])["snn_target"] == 1
    assert set_scores(["", ""], ["CCO", "CCO"])["uniqueness"] == 0
    assert qed("CC(=O)Oc1ccccc1C(=O)O") == pytest.approx(0.55, abs=0.01)  # aspirin
    name, found = task.baseline(task.sample("fragments"))
    assert "random graphs" in name and 0 < found["valid_unique_novel"] <= found["validity"] < 0.9


def test_files_and_pictures_of_predictions(tmp_path):
    batch = {"smiles": ["CCO", "CCN"], "id": ["a", "b"]}
    paths = task.write(said(["CCF", ""]), batch, tmp_path)
    assert [p.name for p in paths] == ["a.smi", "a.sdf"]
    assert read_file(paths[0]) == read_file(paths[1]) == ["CCF"]
    assert task.rows(said(["CCF", ""]), batch, ())[1]["valid"] is False
    picture = task.draw(said(["CCF", ""]), batch)
    assert picture.size[0] == 360 and len(picture.getcolors(100000)) > 3
