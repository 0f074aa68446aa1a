"""Sample data: small molecules put together from fragments."""

from __future__ import annotations

from functools import cache

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.molecule_generation.chemistry import canonical
from formarium.tasks.molecule_generation.data import as_data

FRONTS = ("C", "CC", "F", "Cl", "CO", "N#C", "N", "O", "CS")
RINGS = ("c1ccc({})cc1", "c1ccc({})nc1", "c1cc({})ccc1", "C1CCC({})CC1", "c1ccc({})s1", "C1CC({})C1")
LINKERS = ("C(=O)N", "C(=O)O", "CO", "CN", "C", "S", "CC", "C(=O)")
BACKS = ("C", "CC", "C(C)C", "C2CC2", "c2ccccc2", "C2CCCC2", "CCO", "CCN", "C(C)=O", "CC#C")
TARGET = "C(=O)N"  # the linker of every ligand of the made-up target


def sample(name: str, seed: int = 0) -> Data:
    """ "fragments": 500 molecules (front, ring, linker, back; up to 17 heavy atoms, kekulised), 100 of them held out, and as the target's
    ligands 150 others that all have an amide between ring and back, which none of the molecules has."""
    if name != "fragments":
        raise UnknownName("sample", name, ["fragments"])
    return _fragments(seed)


@cache
def _fragments(seed: int) -> Data:
    rng = np.random.default_rng(seed)
    every = [(f + r.format(k + b), k) for f in FRONTS for r in RINGS for k in LINKERS for b in BACKS]
    linker = {}  # of the first 2000 different molecules
    for i in rng.permutation(len(every)):
        linker.setdefault(canonical(every[i][0]), every[i][1])
        if len(linker) == 2000:
            break
    ligands = [s for s, k in linker.items() if k == TARGET][:150]
    mixed = [s for s in linker if s not in {*ligands}][:500]
    return as_data("fragments", mixed, ligands, {"sample": "fragments", "seed": seed}, kekulize=True, seed=seed)
