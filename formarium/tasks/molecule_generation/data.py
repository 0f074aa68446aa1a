"""Reading molecules: SMILES files (.smi, .txt, .csv) and SDF, one set for a generator to start from and one of a target's ligands.

molecules.smi, target.smi      the two sets (the target's may be missing, where a model needs none); a fifth of the molecules is held out
molecules.smi alone, as a file with target="other.smi"
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formarium.errors import BadInput
from formarium.task import Data, Dataset, Sample
from formarium.tasks.molecule_generation.chemistry import canonical, encode, parse, rdkit
from formarium.tasks.molecule_generation.scores import pattern

FORMATS = (".smi", ".smiles", ".txt", ".csv", ".sdf")
ORDER = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")


class Known(tuple):
    """SMILES of a set, in order; short to print."""

    def __repr__(self) -> str:
        return f"{len(self)} molecules, {self[0] if self else ''} ..."


NONE = Known()
SHARED = ("known", "targets", "motif")  # what all samples of a split have in common


@dataclass
class Strings:
    """Molecules in memory as SMILES, with the target's, the training set's and the target's motif (SMARTS) beside them."""

    smiles: list[str]
    name: str
    targets: Known = NONE
    known: Known = NONE
    motif: str = ""

    def __len__(self) -> int:
        return len(self.smiles)

    def __getitem__(self, index: int) -> Sample:
        own: Sample = {"id": f"{self.name} {index}", "smiles": self.smiles[index]}
        return own | {k: v for k in ("targets", "known", "motif") if (v := getattr(self, k))}


def read(
    path: str | Path, *, target: str | Path | None = None, motif: str = "", max_atoms: int = 45, kekulize: bool = False,
    strict: bool = False, holdout: float = 0.2, seed: int = 0,
) -> Data:  # fmt: skip
    """The molecules of a folder or file of the formats above. Those that RDKit refuses, with more than max_atoms heavy atoms, or with an
    atom that is bonded to none (salts) are left out and named in `notes` (with `strict`: BadInput). motif: SMARTS of what the target's
    molecules have in common, for scores alone. kekulize: alternate double bonds in place of aromatic ones."""
    root = Path(path)
    if not root.exists():
        raise BadInput(str(path), expected="a file or folder of molecules", got="no such path")
    files = sorted(f for f in root.iterdir() if f.suffix.lower() in FORMATS) if root.is_dir() else [root]
    others = [f for f in files if f.stem.lower().startswith(("target", "inhibitor", "ligand"))]
    files = [f for f in files if f not in others]
    if target is not None:
        others = [Path(target)]
        if not others[0].is_file():
            raise BadInput(str(target), expected="a file of the target's molecules", got="no such file")
    if not files:
        raise BadInput(str(path), expected="molecules (.smi, .csv, .sdf)", got="none in it")
    notes: list[str] = []
    source, targets = (_usable([s for f in group for s in read_file(f)], max_atoms, strict, notes) for group in (files, others))
    if len(source) < 2:
        raise BadInput(str(path), expected="at least two usable molecules", got="; ".join(notes) or str(len(source)))
    if others and not targets:
        raise BadInput(str(others[0]), expected="usable molecules of the target", got="; ".join(notes) or "none")
    given = {"path": str(root), **({"target": str(target)} if target is not None else {}), **({"motif": motif} if motif else {})}
    return as_data(root.stem, source, targets, given, motif=motif, notes=notes, kekulize=kekulize, holdout=holdout, seed=seed)


def as_data(
    name: str, source: Sequence[str], targets: Sequence[str], given: dict[str, Any], *, motif: str = "", notes: Sequence[str] = (),
    kekulize: bool = False, holdout: float = 0.2, seed: int = 0,
) -> Data:  # fmt: skip
    """Data from two sets of SMILES; the lists of elements and bonds are what both hold. Raises BadInput for a motif that is no SMARTS."""
    if motif:
        pattern(motif)
    chem, numbers, kinds, largest = rdkit(), {0}, set(), 1
    for smiles in (*source, *targets):
        mol = parse(smiles)
        if kekulize:
            chem.Kekulize(mol, clearAromaticFlags=True)
        numbers |= {a.GetAtomicNum() for a in mol.GetAtoms()}
        kinds |= {b.GetBondType().name for b in mol.GetBonds()}
        largest = max(largest, mol.GetNumAtoms())
    bonds = ("ZERO", *(k for k in ORDER if k in kinds), *sorted(kinds - {*ORDER}))
    order = np.random.default_rng(seed).permutation(len(source))
    held = max(1, round(holdout * len(source)))
    train = [source[i] for i in sorted(order[held:])]
    drawn, known = Known(targets), Known(sorted({*train, *targets}))
    val = Strings([source[i] for i in sorted(order[:held])], "val", drawn, known, motif)
    splits: dict[str, Dataset] = {"train": Strings(train, "train", drawn, motif=motif), "val": val}
    args = {"atoms": tuple(sorted(numbers)), "bonds": bonds, "max_atoms": largest}
    return Data(name, "molecule-generation", splits, args, [], [*notes], given)


def read_file(path: Path) -> list[str]:
    """The SMILES of a file, as they stand ("" for an SDF entry that can't be read)."""
    if path.suffix.lower() not in FORMATS:
        raise BadInput(str(path), expected=f"a file of type {', '.join(FORMATS)}", got=path.suffix or "no suffix")
    if path.suffix.lower() == ".sdf":
        chem = rdkit()
        return [chem.MolToSmiles(m) if m is not None else "" for m in chem.SDMolSupplier(str(path))]
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".csv":
        rows = [*csv.reader(text.splitlines())]
        header = [h.strip().lower() for h in rows[0]] if rows else []
        column = next((i for i, h in enumerate(header) if h in ("smiles", "canonical_smiles")), None)
        return [r[column or 0].strip() for r in rows[column is not None :] if r]
    lines = [line.split()[0] for line in text.splitlines() if line.strip()]
    return lines[1:] if lines and lines[0].lower() == "smiles" else lines


def _usable(smiles: Sequence[str], max_atoms: int, strict: bool, notes: list[str]) -> list[str]:
    """RDKit's own writing of those that can be used, each once."""
    good: list[str] = []
    refused: list[str] = []
    large: list[str] = []
    loose: list[str] = []
    for s in smiles:
        try:
            mol = parse(s)
        except BadInput:
            refused.append(s)
            continue
        alone = any(not atom.GetDegree() for atom in mol.GetAtoms())
        (large if mol.GetNumAtoms() > max_atoms else loose if alone else good).append(s)
    reasons = {"that RDKit refuses": refused, f"with more than {max_atoms} heavy atoms": large, "with an atom bonded to none": loose}
    for what, which in reasons.items():
        if which and strict:
            raise BadInput(f"{len(which)} molecules", expected="molecules that can be used", got=f"some {what}: {', '.join(which[:3])}")
        if which:
            notes.append(f"{len(which)} molecules {what} left out: {', '.join(repr(w) for w in which[:3])}")
    return [*dict.fromkeys(canonical(s) for s in good)]


def inputs(paths: Sequence[str | Path]) -> list[Sample]:
    """Molecules to start from: files, folders, globs, or SMILES as they are typed. What RDKit refuses says so when it is used."""
    found: list[Sample] = []
    for entry in paths:
        p = Path(entry)
        files = sorted(f for f in p.iterdir() if f.suffix.lower() in FORMATS) if p.is_dir() else [p] if p.is_file() else []
        files = files or [Path(f) for f in sorted(glob.glob(str(entry))) if Path(f).is_file()]
        if files:
            found += [{"id": f"{f.stem} {i}", "smiles": s} for f in files for i, s in enumerate(read_file(f))]
        elif p.suffix.lower() in FORMATS:
            raise BadInput(str(entry), expected="a file of molecules, or a SMILES", got="no such file")
        else:
            found.append({"id": str(entry), "smiles": str(entry)})
    if not found:
        raise BadInput("molecules", expected="at least one", got="none")
    return found


class Prepare:
    """Raw sample to the graphs of its molecule and of one of the target's. preprocessing: atoms, bonds, max_atoms, as the model has them.

    Raises BadInput: a SMILES that RDKit refuses, too many atoms, an element that the model doesn't know.
    """

    def __init__(self, preprocessing: Mapping[str, Any]):
        self.how = (tuple(preprocessing["atoms"]), tuple(preprocessing["bonds"]), int(preprocessing["max_atoms"]))
        self._kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def graph(self, smiles: str) -> tuple[np.ndarray, np.ndarray]:
        if smiles not in self._kept:
            self._kept[smiles] = encode(smiles, *self.how)
        return self._kept[smiles]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        out: Sample = {"id": sample["id"], "smiles": sample["smiles"]}
        out["atoms"], out["bonds"] = self.graph(sample["smiles"])
        if sample.get("targets"):
            out["target_smiles"] = sample["targets"][int(rng.integers(len(sample["targets"])))]
            out["target_atoms"], out["target_bonds"] = self.graph(out["target_smiles"])
        return out | {k: sample[k] for k in SHARED if k in sample}


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents."""
    import torch

    batch: dict[str, Any] = {"id": [s["id"] for s in samples]}
    for key in ("atoms", "bonds", "target_atoms", "target_bonds"):
        if key in samples[0]:
            batch[key] = torch.from_numpy(np.stack([s[key] for s in samples]))
    for key in ("smiles", "target_smiles"):
        if key in samples[0]:
            batch[key] = [s[key] for s in samples]
    return batch | {k: samples[0][k] for k in SHARED if k in samples[0]}
