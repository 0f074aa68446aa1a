"""Scores of generated molecules, predictions as plain rows and files, and the trivial rival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formarium.task import Data, file_stem
from formarium.tasks.molecule_generation.chemistry import (
    fingerprints,
    made,
    parse,
    qed,
    rdkit,
    similarities,
    synthetic_accessibility,
)  # fmt: skip


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Shares from 0 to 1, of molecules as they were made, without repair (as MOSES has them):

    valid_unique_novel: RDKit accepts it, no earlier one is the same, and neither the inputs nor the training set (where that is known)
    have it, so that a generator which gives back its input gets 0. validity: RDKit accepts it. repaired_validity: it does after repair.
    uniqueness: different ones of the valid. novelty: of the different ones, those not in the training set. changed: of the valid, those
    that differ from their input.
    Of the different valid ones: qed, sa (1 easy to 10), internal_diversity, snn_target and snn_source (mean similarity to the nearest of
    the target's molecules, of the inputs).
    """
    smiles = [s for p in predictions for s in p.smiles]
    sources = [s for b in batches for s in b["smiles"]]
    targets = sorted({s for b in batches for s in b.get("target_smiles", ())})
    known = next((b["known"] for b in batches if b.get("known")), ())
    valid = np.array([s != "" for s in smiles], dtype=np.float64)
    metrics = {"validity": float(valid.mean())}
    metrics |= {"repaired_validity": float(np.mean([s != "" for p in predictions for s in p.repaired]))}
    counted = new_ones(smiles, sources, known)
    metrics = {"valid_unique_novel": float(counted.mean()), **metrics}
    return metrics | set_scores(smiles, sources, targets, known), {"valid_unique_novel": counted, "validity": valid}


def new_ones(smiles: Sequence[str], sources: Sequence[str], known: Sequence[str] = ()) -> np.ndarray:
    """Of each whether it is valid, the first of its kind, and new (neither in `sources` nor in `known`): 0 or 1."""
    seen = {"", *known, *sources}
    out = np.zeros(len(smiles))
    for i, s in enumerate(smiles):
        out[i] = s not in seen
        seen.add(s)
    return out


def set_scores(smiles: Sequence[str], sources: Sequence[str], targets: Sequence[str] = (), known: Sequence[str] = ()) -> dict[str, float]:
    """What `score` says of the valid ones ("" stands for an invalid one); 0 where there is none."""
    pairs = [(s, source) for s, source in zip(smiles, sources, strict=True) if s]
    different = sorted({s for s, _ in pairs})
    names = ("uniqueness", "novelty", "changed", "qed", "sa", "snn_source", "snn_target", "internal_diversity")
    if not different:
        return dict.fromkeys(names, 0.0)
    prints = fingerprints(different)
    among = similarities(prints, prints)
    training = {*known}
    found = {
        "uniqueness": len(different) / len(pairs),
        "novelty": float(np.mean([s not in training for s in different])),
        "changed": float(np.mean([s != source for s, source in pairs])),
        "qed": float(np.mean([qed(s) for s in different])),
        "sa": float(np.mean([synthetic_accessibility(s) for s in different])),
        "snn_source": float(similarities(prints, fingerprints(sorted({*sources}))).max(1).mean()),
        "internal_diversity": float(1 - among.mean()),
    }
    if targets:
        found["snn_target"] = float(similarities(prints, fingerprints(targets)).max(1).mean())
    return found


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a sample: id, input, smiles ("" where RDKit refuses it), valid, repaired, and the QED of what is valid."""
    ids = batch.get("id") or [str(i) for i in range(len(prediction.smiles))]
    out = []
    for name, source, smiles, repaired in zip(ids, batch["smiles"], prediction.smiles, prediction.repaired, strict=True):
        found = {"id": name, "input": source, "smiles": smiles, "valid": smiles != "", "repaired": repaired}
        out.append(found | ({"qed": round(qed(smiles), 4)} if smiles else {}))
    return out


def write(prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """NAME.smi and NAME.sdf (2D coordinates) for each sample: what was made, repaired where RDKit refused it. A sample that leaves nothing
    has no files."""
    from rdkit.Chem import rdDepictor

    chem, paths = rdkit(), []
    for row in rows(prediction, batch, names):
        if not row["repaired"]:
            continue
        stem = folder / file_stem(row["id"])
        mol = parse(row["repaired"])
        rdDepictor.Compute2DCoords(mol)
        for key in ("id", "input", "valid"):
            mol.SetProp(key, str(row[key]))
        mol.SetProp("_Name", str(row["id"]))
        smi, sdf = (stem.with_name(stem.name + suffix) for suffix in (".smi", ".sdf"))
        smi.write_text(f"{row['repaired']} {file_stem(row['id'])}\n", encoding="utf-8")
        with chem.SDWriter(str(sdf)) as writer:
            writer.write(mol)
        paths += [smi, sdf]
    return paths


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """Graphs whose sizes, atoms and bonds are drawn by their frequencies in the training set; as many as "val" has, scored alike."""
    from formarium.tasks.molecule_generation.data import Prepare

    rng, prepare, args = np.random.default_rng(seed), Prepare(data.model_args), data.model_args
    train = [prepare.graph(data.splits["train"][i]["smiles"]) for i in range(len(data.splits["train"]))]
    sizes = np.array([(a > 0).sum() for a, _ in train])
    atoms = np.bincount(np.concatenate([a[a > 0] for a, _ in train]), minlength=len(args["atoms"])).astype(float)
    pairs = [b[np.tril_indices(n, -1)] for (_, b), n in zip(train, sizes, strict=True)]
    bonds = np.bincount(np.concatenate(pairs), minlength=len(args["bonds"])).astype(float)
    val = [data.splits["val"][i] for i in range(len(data.splits["val"]))]
    smiles = []
    for _ in val:
        n, most = int(rng.choice(sizes)), args["max_atoms"]
        types, links = np.zeros(most, np.int64), np.zeros((most, most), np.int64)
        types[:n] = rng.choice(len(atoms), size=n, p=atoms / atoms.sum())
        links[np.tril_indices(n, -1)] = rng.choice(len(bonds), size=n * (n - 1) // 2, p=bonds / bonds.sum())
        smiles.append(made(types, links, args["atoms"], args["bonds"])[0])
    sources, known = [s["smiles"] for s in val], val[0].get("known", ())
    found = set_scores(smiles, sources, val[0].get("targets", ()), known)
    found["valid_unique_novel"] = float(new_ones(smiles, sources, known).mean())
    return "random graphs with the training set's frequencies", {"validity": float(np.mean([s != "" for s in smiles])), **found}


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 6) -> Any:
    """Up to six pairs: the input above, what was made of it below (repaired where RDKit refused it)."""
    from PIL import Image, ImageDraw, ImageFont
    from rdkit.Chem import Draw

    tile, caption = 180, 20
    shown = min(most, len(prediction.smiles))
    sheet = Image.new("RGB", (max(1, shown) * tile, 2 * (tile + caption)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i in range(shown):
        smiles = prediction.smiles[i]
        said = "made" if smiles else "repaired" if prediction.repaired[i] else "nothing that RDKit accepts"
        for line, (text, what) in enumerate(((batch["smiles"][i], "input"), (smiles or prediction.repaired[i], said))):
            y = line * (tile + caption)
            if text:
                sheet.paste(Draw.MolToImage(parse(text), size=(tile, tile)), (i * tile, y))
            pen.text((i * tile + 6, y + tile + 2), what, (40, 44, 52) if smiles or not line else (190, 60, 40), font)
    return sheet
