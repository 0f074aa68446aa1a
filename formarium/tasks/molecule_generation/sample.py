"""Sample data: small molecules put together from fragments."""

from __future__ import annotations

from functools import cache

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.molecule_generation.chemistry import canonical, parse, rdkit
from formarium.tasks.molecule_generation.data import as_data
from formarium.tasks.molecule_generation.scores import has_motif

FRONTS = ("C", "CC", "F", "Cl", "CO", "N#C", "N", "O", "CS")
RINGS = ("c1ccc({})cc1", "c1ccc({})nc1", "c1cc({})ccc1", "C1CCC({})CC1", "c1ccc({})s1", "C1CC({})C1")
LINKERS = ("C(=O)N", "C(=O)O", "CO", "CN", "C", "S", "CC", "C(=O)")
BACKS = ("C", "CC", "C(C)C", "C2CC2", "c2ccccc2", "C2CCCC2", "CCO", "CCN", "C(C)=O", "CC#C")
TARGET = "C(=O)N"  # the linker of every ligand of the made-up target
AMIDES, FLUORIDES = "[CX3](=O)[NX3]", "[#6]F"  # the motifs, as SMARTS
SMALL_FRONTS = (*FRONTS, "Br", "S")
SMALL_RINGS = (*RINGS, "c1ccc({})o1", "C1C({})C1", "c1nc({})ccc1", "C1CCC({})C1")
SMALL_LINKERS = ("C(=O)N", "C(=O)O", "O", "N", "CO", "CN", "C", "S", "CC", "C(=O)", "")
SMALL_BACKS = ("C", "CC", "C(C)C", "C2CC2", "CCO", "CCN", "C(C)=O", "C#C", "C=C", "C#N")


def sample(name: str, seed: int = 0) -> Data:
    """500 molecules put together from front, ring, linker and back, kekulised, 100 of them held out, and 150 others as ligands of a made-up
    target:

    "fragments": up to 17 heavy atoms; the ligands all have an amide between ring and back, which none of the molecules has.
    "fluorides": up to 10 heavy atoms; the ligands all have a carbon with fluorine, which one in fifteen of the molecules has, so that a
    generator gets nearer by changing elements where they stand.
    """
    if name not in ("fragments", "fluorides"):
        raise UnknownName("sample", name, ["fragments", "fluorides"])
    return _fragments(seed) if name == "fragments" else _fluorides(seed)


@cache
def _fragments(seed: int) -> Data:
    rng = np.random.default_rng(seed)
    every = [(f + r.format(k + b), k) for f in FRONTS for r in RINGS for k in LINKERS for b in BACKS]
    linker: dict[str, str] = {}  # of the first 2000 different molecules
    for i in rng.permutation(len(every)):
        linker.setdefault(canonical(every[i][0]), every[i][1])
        if len(linker) == 2000:
            break
    ligands = [s for s, k in linker.items() if k == TARGET][:150]
    mixed = [s for s in linker if s not in {*ligands}][:500]
    return as_data("fragments", mixed, ligands, {"sample": "fragments", "seed": seed}, motif=AMIDES, kekulize=True, seed=seed)


@cache
def _fluorides(seed: int) -> Data:
    rng = np.random.default_rng(seed)
    every = [f + r.format(k + b) for f in SMALL_FRONTS for r in SMALL_RINGS for k in SMALL_LINKERS for b in SMALL_BACKS]
    drawn: dict[str, bool] = {}  # the first 3000 different ones of at most 10 atoms, and whether they have the motif
    for i in rng.permutation(len(every)):
        mol = parse(every[i])
        if mol.GetNumAtoms() <= 10:
            smiles = rdkit().MolToSmiles(mol)
            drawn.setdefault(smiles, has_motif(smiles, FLUORIDES))
        if len(drawn) == 3000:
            break
    ligands = [s for s, has in drawn.items() if has][:150]
    others = [s for s in drawn if s not in {*ligands}]
    mixed = [others[i] for i in rng.permutation(len(others))[:500]]
    return as_data("fluorides", mixed, ligands, {"sample": "fluorides", "seed": seed}, motif=FLUORIDES, kekulize=True, seed=seed)
