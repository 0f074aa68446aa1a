import numpy as np
import pytest

from formarium import create
from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of

pytest.importorskip("rdkit")
from formarium.tasks.molecule_generation import scores
from formarium.tasks.molecule_generation.chemistry import (
    canonical,
    decode,
    encode,
    made,
    repair,
    sanitised,
)
from formarium.tasks.molecule_generation.data import Prepare, read, read_file
from formarium.tasks.molecule_generation.metrics import nearer, rivals, set_scores
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
    (tmp_path / "molecules.smi").write_text("CCO ethanol\nC1CC bad\nCCN\n" + "C" * 50 + "\nCCCC\nOCC\nCC[NH3+].[Cl-]\n")
    (tmp_path / "target.csv").write_text("name,smiles\na,CC(=O)N\nb,CC(=O)NC\n")
    data = read(tmp_path)
    assert data.model_args == {"atoms": (0, 6, 7, 8), "bonds": ("ZERO", "SINGLE", "DOUBLE"), "max_atoms": 5}
    assert len(data.splits["train"]) + len(data.splits["val"]) == 3 and len(data.notes) == 3  # ethanol is there once, the salt is not
    assert len(data.splits["train"][0]["targets"]) == 2 and "motif" not in data.splits["train"][0]
    named = read(tmp_path, motif="C(=O)N")
    assert named.splits["val"][0]["motif"] == "C(=O)N" == named.source["motif"]
    with pytest.raises(BadInput, match="SMARTS"):
        read(tmp_path, motif="C(=O")
    with pytest.raises(BadInput, match="refuses"):
        read(tmp_path, strict=True)
    alone = read(tmp_path / "molecules.smi")
    assert "targets" not in alone.splits["train"][0]
    for path, options in [("nowhere", {}), ("target.csv", {"target": tmp_path / "no.smi"}), ("target.csv", {"max_atoms": 2})]:
        with pytest.raises(BadInput) as e:
            read(tmp_path / path, **options)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(("name", "most", "smarts"), [("fragments", 17, "[CX3](=O)[NX3]"), ("fluorides", 10, "[#6]F")])
def test_sample_data(name, most, smarts):
    data = task.sample(name)
    assert len(data.splits["train"]) == 400 and len(data.splits["val"]) == 100 and data.model_args["max_atoms"] <= most
    assert not {*data.splits["train"].smiles} & {*data.splits["val"].smiles}
    val = data.splits["val"]
    assert len(val.targets) == 150 and not {*val.targets} & {*val.smiles, *data.splits["train"].smiles}
    assert val.motif == smarts and all(scores.has_motif(s, smarts) for s in val.targets)
    assert np.mean([scores.has_motif(s, smarts) for s in val.smiles]) < 0.15
    with pytest.raises(UnknownName):
        task.sample("chembl")


def test_the_micro_variant_fits_its_sample():
    assert create("druggen_micro").config.atoms == task.sample("fluorides").model_args["atoms"]


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
    assert metrics["nearer_target"] == pytest.approx(1 / 3) and metrics["novelty_target"] == 0.5 and metrics["novelty_source"] == 0.5
    assert task.score([said(batch["smiles"])], [batch])[0]["valid_unique_novel"] == 0  # whoever gives back its input
    assert 0 < metrics["qed"] < 1 and 0 < metrics["internal_diversity"] < 1
    assert set_scores(["CCF"], ["CCO"], ["CCF"])["snn_target"] == 1
    nothing = set_scores(["", ""], ["CCO", "CCO"], ["CCF"], (), "F")
    assert nothing["uniqueness"] == nothing["motif"] == 0 and 0 < nothing["snn_target_source"] < 1
    assert {*set_scores(["CCF"], ["CCO"], ["CCF"], (), "F")} - {*nothing} == {"weight_target", "logp_target"}


def test_on_target():
    batch = {"smiles": ["CCO", "CCCl", "CCN", "CCCC"], "targets": ("CCF", "CCCF"), "known": ("CCCF",), "id": list("abcd")}
    found = said(["CCF", "CCBr", "FCF", ""])
    with_motif, each = task.score([found], [{**batch, "motif": "[#6]F"}])
    assert each["on_target"].tolist() == [1, 0, 1, 0] and with_motif["motif"] == pytest.approx(2 / 3) and with_motif["motif_source"] == 0
    by_distance, each = task.score([found], [batch])
    assert each["on_target"][0] == 1 and each["on_target"][3] == 0 and "motif" not in by_distance
    assert each["on_target"].tolist() == nearer(["CCF", "CCBr", "FCF", ""], batch["smiles"], batch["targets"]).tolist()
    known = task.score([said(["CCCF", "CCF", "CCF", "CCO"])], [{**batch, "motif": "[#6]F"}])[1]
    assert known["on_target"].tolist() == [0, 1, 0, 0]  # known, new, the same again, an input without the motif
    without = {k: v for k, v in batch.items() if k != "targets"}
    metrics, each = task.score([found], [without])
    assert each["on_target"].tolist() == each["valid_unique_novel"].tolist() and "snn_target" not in metrics


@pytest.mark.parametrize(("name", "motif_source"), [("fluorides", 0.08), ("fragments", 0.0)])
def test_trivial_rivals(name, motif_source):
    data = task.sample(name)
    found = rivals(data)
    same, graphs, changes = found.values()
    assert same["valid_unique_novel"] == same["on_target"] == same["nearer_target"] == 0 and same["validity"] == 1
    assert same["motif"] == same["motif_source"] == changes["motif_source"] == pytest.approx(motif_source)
    assert same["snn_target"] == pytest.approx(same["snn_target_source"])
    assert 0 < graphs["valid_unique_novel"] <= graphs["validity"] < 0.9 and 0.5 < changes["validity"] < 0.9
    best, metrics = task.baseline(data)
    assert metrics["on_target"] == max(r["on_target"] for r in found.values()) and metrics == found[best]


def test_properties():
    aspirin = "CC(=O)Oc1ccccc1C(=O)O"
    assert scores.qed(aspirin) == pytest.approx(0.55, abs=0.01) and scores.weight(aspirin) == pytest.approx(180.16, abs=0.01)
    assert scores.synthetic_accessibility(aspirin) == pytest.approx(1.58, abs=0.02)
    assert scores.logp(aspirin) == pytest.approx(1.31, abs=0.01)
    assert scores.lipinski(aspirin) == 5 and scores.veber(aspirin) == 2
    assert scores.lipinski("C" * 40) == 2 and scores.veber("C" * 40) == 1  # heavy, greasy, floppy
    assert scores.is_pains("O=C1C=CC(=O)C=C1") and not scores.is_pains(aspirin)  # a quinone
    assert scores.fragments(["CC(=O)NCC"]) and scores.cosine(scores.fragments(["CCOC"]), scores.fragments(["CCOC"])) == pytest.approx(1)
    two = "c1ccc(Cc2ccccc2)cc1"
    assert scores.scaffolds([two + "C", two, "c1ccccc1"]) == {two: 2}
    assert scores.cosine(scores.scaffolds(["CC"]), scores.scaffolds([two])) == 0
    assert scores.distance(len, ["C", "CC"], ["CC", "CCC"]) == pytest.approx(1) and scores.distance(len, ["C"], ["C", "CCC"]) == 1


def test_files_and_pictures_of_predictions(tmp_path):
    batch = {"smiles": ["CCO", "CCN"], "id": ["a", "b"]}
    paths = task.write(said(["CCF", ""]), batch, tmp_path)
    assert [p.name for p in paths] == ["a.smi", "a.sdf"]
    assert read_file(paths[0]) == read_file(paths[1]) == ["CCF"]
    first, second = task.rows(said(["CCF", ""]), batch, ())
    assert second["valid"] is False and "qed" not in second
    assert (first["lipinski"], first["veber"], first["pains"]) == (5, 2, False) and 0 < first["qed"] < 1 < first["sa"]
    picture = task.draw(said(["CCF", ""]), batch)
    assert picture.size[0] == 360 and len(picture.getcolors(100000)) > 3
