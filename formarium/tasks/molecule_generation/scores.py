"""What a molecule is worth, by RDKit: fingerprints and similarity, drug-likeness, rules of thumb, alerts, fragments and scaffolds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

from formarium.errors import BadInput
from formarium.tasks.molecule_generation.chemistry import parse, rdkit

kept = lru_cache(1 << 16)  # by SMILES: sets are scored again and again while a model trains


@cache
def _morgan() -> Any:
    from rdkit.Chem import rdFingerprintGenerator

    return rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)


@kept
def _fingerprint(smiles: str) -> Any:
    return _morgan().GetFingerprint(parse(smiles))


def fingerprints(smiles: Sequence[str]) -> list[Any]:
    """Morgan fingerprints, radius 2, 1024 bits."""
    return [_fingerprint(s) for s in smiles]


def similarities(a: Sequence[Any], b: Sequence[Any]) -> np.ndarray:
    """Tanimoto similarities [len(a), len(b)] of fingerprints."""
    from rdkit import DataStructs

    return np.array([DataStructs.BulkTanimotoSimilarity(x, [*b]) for x in a]).reshape(len(a), len(b))


@cache
def pattern(smarts: str) -> Any:
    """The query of a SMARTS string. Raises BadInput."""
    query = rdkit().MolFromSmarts(smarts) if isinstance(smarts, str) and smarts.strip() else None
    if query is None:
        raise BadInput(f"motif {smarts!r}", expected="a SMARTS pattern that RDKit accepts", got="one it refuses")
    return query


def has_motif(smiles: str, smarts: str) -> bool:
    return bool(smiles) and bool(parse(smiles).HasSubstructMatch(pattern(smarts)))


@kept
def qed(smiles: str) -> float:
    """Quantitative estimate of drug-likeness, 0 to 1."""
    from rdkit.Chem import QED

    return float(QED.qed(parse(smiles)))


@cache
def _sa() -> Any:
    """The synthetic accessibility scorer that RDKit ships beside its package, None where it isn't."""
    import importlib.util
    from pathlib import Path

    from rdkit.Chem import RDConfig

    path = Path(RDConfig.RDContribDir) / "SA_Score" / "sascorer.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("sascorer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@kept
def synthetic_accessibility(smiles: str) -> float:
    """Ertl's score, 1 (easy) to 10; NaN where RDKit's contributed scorer isn't installed."""
    scorer = _sa()
    return float("nan") if scorer is None else float(scorer.calculateScore(parse(smiles)))


@kept
def weight(smiles: str) -> float:
    """Molecular weight, g/mol."""
    from rdkit.Chem import Descriptors

    return float(Descriptors.MolWt(parse(smiles)))  # type: ignore[attr-defined]


@kept
def logp(smiles: str) -> float:
    """Crippen's estimate of the octanol-water partition coefficient's logarithm."""
    from rdkit.Chem import rdMolDescriptors

    return float(rdMolDescriptors.CalcCrippenDescriptors(parse(smiles))[0])


@kept
def lipinski(smiles: str) -> int:
    """How many of five rules a molecule keeps: monoisotopic mass below 500, at most 5 donors and 10 acceptors of hydrogen bonds, logP from
    -2 to 5, at most 10 rotatable bonds."""
    from rdkit.Chem import rdMolDescriptors

    mol = parse(smiles)
    kept = (
        rdMolDescriptors.CalcExactMolWt(mol) < 500,
        rdMolDescriptors.CalcNumHBD(mol) <= 5,
        rdMolDescriptors.CalcNumHBA(mol) <= 10,
        -2 <= logp(smiles) <= 5,
        rdMolDescriptors.CalcNumRotatableBonds(mol) <= 10,
    )
    return sum(kept)


@kept
def veber(smiles: str) -> int:
    """How many of two rules a molecule keeps: at most 10 rotatable bonds, polar surface of at most 140 square angstrom."""
    from rdkit.Chem import rdMolDescriptors

    mol = parse(smiles)
    return (rdMolDescriptors.CalcNumRotatableBonds(mol) <= 10) + (rdMolDescriptors.CalcTPSA(mol) <= 140)


@cache
def _pains() -> Any:
    from rdkit.Chem.FilterCatalog import FilterCatalog, FilterCatalogParams

    wanted = FilterCatalogParams()
    wanted.AddCatalog(FilterCatalogParams.FilterCatalogs.PAINS)  # A, B and C
    return FilterCatalog(wanted)


@kept
def is_pains(smiles: str) -> bool:
    """Whether one of the 480 substructures that disturb assays (Baell and Holloway 2010) is in a molecule."""
    return bool(_pains().HasMatch(parse(smiles)))


@kept
def _fragments(smiles: str) -> tuple[str, ...]:
    from rdkit.Chem import BRICS

    return (*rdkit().MolToSmiles(BRICS.BreakBRICSBonds(parse(smiles))).split("."),)


def fragments(smiles: Sequence[str]) -> Counter[str]:
    """How often each BRICS fragment is in the molecules."""
    return Counter(piece for s in smiles for piece in _fragments(s))


@kept
def _scaffold(smiles: str) -> tuple[str, int]:
    from rdkit.Chem.Scaffolds import MurckoScaffold

    core = MurckoScaffold.GetScaffoldForMol(parse(smiles))
    return (rdkit().MolToSmiles(core), core.GetRingInfo().NumRings()) if core.GetNumAtoms() else ("", 0)


def scaffolds(smiles: Sequence[str], min_rings: int = 2) -> Counter[str]:
    """How often each Murcko scaffold of at least so many rings is in the molecules."""
    return Counter(core for core, rings in map(_scaffold, smiles) if core and rings >= min_rings)


def cosine(a: Counter[str], b: Counter[str]) -> float:
    """Of two counts, 0 to 1; 0 where one is empty."""
    if not a or not b:
        return 0.0
    dot = sum(n * b[key] for key, n in a.items())
    length = sum(n * n for n in a.values()) * sum(n * n for n in b.values())
    return dot / float(length) ** 0.5


def distance(of: Callable[[str], float], a: Sequence[str], b: Sequence[str]) -> float:
    """Wasserstein distance between a property's distributions over two sets of molecules, in the property's unit."""
    x, y = (np.sort([of(s) for s in group]) for group in (a, b))
    every = np.sort(np.concatenate([x, y]))
    below = [np.searchsorted(group, every[:-1], "right") / len(group) for group in (x, y)]
    return float((np.abs(below[0] - below[1]) * np.diff(every)).sum())
