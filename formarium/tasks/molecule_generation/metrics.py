"""Scores of generated molecules, predictions as plain rows and files, and the trivial rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formarium.task import Data, file_stem
from formarium.tasks.molecule_generation import scores
from formarium.tasks.molecule_generation.chemistry import made, parse, rdkit
from formarium.tasks.molecule_generation.scores import fingerprints, has_motif, similarities


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Of molecules as they were made, without repair (as MOSES has them). Shares from 0 to 1 of all that was made:

    on_target: valid, new and the first of its kind as below, and, where there is a target, of its kind: it has the target's motif where the
    data name one, else it is nearer to the target's molecules than the molecule it was made from. valid_unique_novel: RDKit accepts it, no
    earlier one is the same, and neither the inputs nor the training set and the target's molecules (where these are known) have it, so that
    a generator which gives back its input gets 0. validity: RDKit accepts it. repaired_validity: it does after repair.
    The rest, of the valid ones, is `set_scores`.
    """
    smiles = [s for p in predictions for s in p.smiles]
    sources = [s for b in batches for s in b["smiles"]]
    targets, known, motif = (next((b[key] for b in batches if b.get(key)), "") for key in ("targets", "known", "motif"))
    targets = targets or sorted({s for b in batches for s in b.get("target_smiles", ())})
    shares, found = all_scores(smiles, sources, targets, known, motif)
    repaired = {"repaired_validity": float(np.mean([s != "" for p in predictions for s in p.repaired]))}
    return {**{k: float(v.mean()) for k, v in shares.items()}, **repaired, **found}, shares


def all_scores(
    smiles: Sequence[str], sources: Sequence[str], targets: Sequence[str] = (), known: Sequence[str] = (), motif: str = ""
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(of each molecule whether it counts for on_target, valid_unique_novel and validity; `set_scores`)"""
    valid = np.array([s != "" for s in smiles], dtype=np.float64)
    counted = new_ones(smiles, sources, known)
    if motif:
        own = np.array([has_motif(s, motif) for s in smiles], dtype=np.float64)
    else:
        own = nearer(smiles, sources, targets) if targets else valid
    shares = {"on_target": counted * own, "valid_unique_novel": counted, "validity": valid}
    return shares, set_scores(smiles, sources, targets, known, motif)


def new_ones(smiles: Sequence[str], sources: Sequence[str], known: Sequence[str] = ()) -> np.ndarray:
    """Of each whether it is valid, the first of its kind, and new (neither in `sources` nor in `known`): 0 or 1."""
    seen = {"", *known, *sources}
    out = np.zeros(len(smiles))
    for i, s in enumerate(smiles):
        out[i] = s not in seen
        seen.add(s)
    return out


def nearer(smiles: Sequence[str], sources: Sequence[str], targets: Sequence[str]) -> np.ndarray:
    """Of each whether it is valid and its nearest of `targets` is nearer than that of the molecule it was made from: 0 or 1."""
    places, prints = [i for i, s in enumerate(smiles) if s], fingerprints(targets)
    out = np.zeros(len(smiles))
    if places:
        after, before = (similarities(fingerprints([group[i] for i in places]), prints).max(1) for group in (smiles, sources))
        out[places] = after > before
    return out


SCORES = (
    "uniqueness", "changed", "novelty", "novelty_source", "qed", "sa", "lipinski", "veber", "pains", "weight", "heavy_atoms", "elements",
    "snn_source", "fragments_source", "scaffolds_source", "internal_diversity",
)  # fmt: skip
TARGETED = ("novelty_target", "snn_target", "nearer_target", "fragments_target", "scaffolds_target")


def set_scores(
    smiles: Sequence[str], sources: Sequence[str], targets: Sequence[str] = (), known: Sequence[str] = (), motif: str = ""
) -> dict[str, float]:
    """Scores of the valid ones ("" stands for an invalid one); 0 where there is none (and no distances).

    Of the valid ones: uniqueness: different ones. changed: those that differ from their input. Of the different ones: novelty,
    novelty_source, novelty_target: those not in the training set, among the inputs, among the target's molecules; qed, sa (1 easy to 10),
    lipinski (rules kept of 5), veber (of 2), pains (share that has an alert), weight (g/mol), heavy_atoms and elements (mean numbers),
    internal_diversity; of the inputs and, where there is a target, of the target's molecules snn_source and snn_target: mean similarity to
    the nearest of them; fragments_source and so on, scaffolds_source and so on: cosine between counts of BRICS fragments, of Murcko
    scaffolds of two rings or more. Where there is a target, nearer_target: of the valid, those nearer to it than their input is;
    snn_target_source: snn_target of the inputs themselves; weight_target, logp_target: Wasserstein distances to its distributions of
    weight and logP. Where the data name a motif, motif: the share of the valid that has it; motif_source: of the inputs.
    """
    pairs = [(s, source) for s, source in zip(smiles, sources, strict=True) if s]
    different, inputs = sorted({s for s, _ in pairs}), sorted({*sources})
    found = {"motif_source": float(np.mean([has_motif(s, motif) for s in sources]))} if motif else {}
    targeted = fingerprints(targets)
    if targets:
        found["snn_target_source"] = float(similarities(fingerprints(inputs), targeted).max(1).mean())
    if not different:
        return dict.fromkeys((*SCORES, *(TARGETED if targets else ()), *(("motif",) if motif else ())), 0.0) | found
    prints, atoms = fingerprints(different), [parse(s).GetAtoms() for s in different]
    found |= {
        "uniqueness": len(different) / len(pairs),
        "changed": float(np.mean([s != source for s, source in pairs])),
        "novelty": _outside(different, known),
        "novelty_source": _outside(different, sources),
        "qed": _mean(scores.qed, different),
        "sa": _mean(scores.synthetic_accessibility, different),
        "lipinski": _mean(scores.lipinski, different),
        "veber": _mean(scores.veber, different),
        "pains": _mean(scores.is_pains, different),
        "weight": _mean(scores.weight, different),
        "heavy_atoms": float(np.mean([len(a) for a in atoms])),
        "elements": float(np.mean([len({x.GetAtomicNum() for x in a}) for a in atoms])),
        "snn_source": float(similarities(prints, fingerprints(inputs)).max(1).mean()),
        "fragments_source": scores.cosine(scores.fragments(different), scores.fragments(inputs)),
        "scaffolds_source": scores.cosine(scores.scaffolds(different), scores.scaffolds(inputs)),
        "internal_diversity": float(1 - similarities(prints, prints).mean()),
    }
    if motif:
        found["motif"] = float(np.mean([has_motif(s, motif) for s, _ in pairs]))
    if targets:
        found |= {
            "novelty_target": _outside(different, targets),
            "snn_target": float(similarities(prints, targeted).max(1).mean()),
            "nearer_target": float(nearer([s for s, _ in pairs], [source for _, source in pairs], targets).mean()),
            "weight_target": scores.distance(scores.weight, different, targets),
            "logp_target": scores.distance(scores.logp, different, targets),
            "fragments_target": scores.cosine(scores.fragments(different), scores.fragments(targets)),
            "scaffolds_target": scores.cosine(scores.scaffolds(different), scores.scaffolds(targets)),
        }
    return found


def _outside(smiles: Sequence[str], others: Sequence[str]) -> float:
    known = {*others}
    return float(np.mean([s not in known for s in smiles]))


def _mean(of: Callable[[str], float], smiles: Sequence[str]) -> float:
    return float(np.mean([of(s) for s in smiles]))


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a sample: id, input, smiles ("" where RDKit refuses it), valid, repaired, and of what is valid qed, sa, lipinski (rules kept
    of 5), veber (of 2) and pains (whether it has an alert), to sort and filter by."""
    ids = batch.get("id") or [str(i) for i in range(len(prediction.smiles))]
    out = []
    for name, source, smiles, repaired in zip(ids, batch["smiles"], prediction.smiles, prediction.repaired, strict=True):
        found = {"id": name, "input": source, "smiles": smiles, "valid": smiles != "", "repaired": repaired}
        out.append(found | (worth(smiles) if smiles else {}))
    return out


def worth(smiles: str) -> dict[str, Any]:
    rounded = {"qed": round(scores.qed(smiles), 4), "sa": round(scores.synthetic_accessibility(smiles), 4)}
    return {**rounded, "lipinski": scores.lipinski(smiles), "veber": scores.veber(smiles), "pains": scores.is_pains(smiles)}


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
    """The best, by on_target, of three trivial rivals that make as many molecules as "val" has and are scored alike: the inputs given back;
    graphs whose sizes, atoms and bonds have the frequencies of the training set; the inputs with one atom each changed at random."""
    found = rivals(data, seed)
    best = max(found, key=lambda name: (found[name]["on_target"], found[name]["valid_unique_novel"]))
    return best, found[best]


def rivals(data: Data, seed: int = 0) -> dict[str, dict[str, float]]:
    """The metrics of each trivial rival of `baseline`, by its name."""
    from formarium.tasks.molecule_generation.data import Prepare

    val = [data.splits["val"][i] for i in range(len(data.splits["val"]))]
    sources, targets, known, motif = [s["smiles"] for s in val], val[0].get("targets", ()), val[0].get("known", ()), val[0].get("motif", "")
    made_by = {
        "the inputs given back": sources,
        "random graphs with the training set's frequencies": random_graphs(data, Prepare(data.model_args), seed),
        "the inputs with one atom changed at random": random_changes(data, Prepare(data.model_args), seed),
    }
    out = {}
    for name, smiles in made_by.items():
        shares, others = all_scores(smiles, sources, targets, known, motif)
        out[name] = {**{k: float(v.mean()) for k, v in shares.items()}, **others}
    return out


def random_graphs(data: Data, prepare: Any, seed: int) -> list[str]:
    """As many as "val" has, with sizes, atoms and bonds drawn by their frequencies in the training set."""
    rng, args = np.random.default_rng(seed), data.model_args
    train = [prepare.graph(data.splits["train"][i]["smiles"]) for i in range(len(data.splits["train"]))]
    sizes = np.array([(a > 0).sum() for a, _ in train])
    atoms = np.bincount(np.concatenate([a[a > 0] for a, _ in train]), minlength=len(args["atoms"])).astype(float)
    pairs = [b[np.tril_indices(n, -1)] for (_, b), n in zip(train, sizes, strict=True)]
    bonds = np.bincount(np.concatenate(pairs), minlength=len(args["bonds"])).astype(float)
    smiles = []
    for _ in range(len(data.splits["val"])):
        n, most = int(rng.choice(sizes)), args["max_atoms"]
        types, links = np.zeros(most, np.int64), np.zeros((most, most), np.int64)
        types[:n] = rng.choice(len(atoms), size=n, p=atoms / atoms.sum())
        links[np.tril_indices(n, -1)] = rng.choice(len(bonds), size=n * (n - 1) // 2, p=bonds / bonds.sum())
        smiles.append(made(types, links, args["atoms"], args["bonds"])[0])
    return smiles


def random_changes(data: Data, prepare: Any, seed: int) -> list[str]:
    """The molecules of "val", with one atom of each made another element, drawn by its frequency in the target's molecules (where there is
    no target, the training set)."""
    rng, args = np.random.default_rng(seed), data.model_args
    val = [data.splits["val"][i] for i in range(len(data.splits["val"]))]
    like = val[0].get("targets") or [data.splits["train"][i]["smiles"] for i in range(len(data.splits["train"]))]
    counts = np.bincount(np.concatenate([prepare.graph(s)[0] for s in like]), minlength=len(args["atoms"])).astype(float)
    counts[0] = 0
    smiles = []
    for sample in val:
        types, links = prepare.graph(sample["smiles"])
        place = int(rng.integers((types > 0).sum()))
        others = np.where(np.arange(len(counts)) == types[place], 0, counts)
        changed = types.copy()
        if others.sum():
            changed[place] = rng.choice(len(counts), p=others / others.sum())
        smiles.append(made(changed, links, args["atoms"], args["bonds"])[0])
    return smiles


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
