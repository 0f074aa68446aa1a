"""Molecules and graphs, by RDKit: SMILES to atoms and bonds, atoms and bonds to molecules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from formarium.errors import BadInput, MissingExtra


@cache
def rdkit() -> Any:
    """RDKit's Chem, quiet. Raises MissingExtra."""
    try:
        from rdkit import Chem, RDLogger
    except ImportError:
        raise MissingExtra("rdkit", "graph") from None
    RDLogger.DisableLog("rdApp.*")
    return Chem


def parse(smiles: str) -> Any:
    """The molecule of a SMILES string. Raises BadInput where RDKit refuses it, or it has no atoms."""
    mol = rdkit().MolFromSmiles(smiles) if isinstance(smiles, str) and smiles.strip() else None
    if mol is None or not mol.GetNumAtoms():
        raise BadInput(f"SMILES {smiles!r}", expected="a molecule that RDKit accepts", got="one it refuses")
    return mol


def canonical(smiles: str) -> str:
    return rdkit().MolToSmiles(parse(smiles))


def encode(smiles: str, atoms: Sequence[int], bonds: Sequence[str], max_atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """(atoms int64 [max_atoms], bonds int64 [max_atoms, max_atoms]) of a molecule; kekulised where `bonds` has no AROMATIC.

    Raises BadInput: a SMILES that RDKit refuses, too many atoms, an element or bond that isn't in the lists.
    """
    chem, mol = rdkit(), parse(smiles)
    if mol.GetNumAtoms() > max_atoms:
        raise BadInput(f"SMILES {smiles!r}", expected=f"at most {max_atoms} heavy atoms", got=str(mol.GetNumAtoms()))
    if "AROMATIC" not in bonds:
        chem.Kekulize(mol, clearAromaticFlags=True)
    types, links = np.zeros(max_atoms, np.int64), np.zeros((max_atoms, max_atoms), np.int64)
    places, kinds = {a: i for i, a in enumerate(atoms)}, {b: i for i, b in enumerate(bonds)}
    for i, atom in enumerate(mol.GetAtoms()):
        if atom.GetAtomicNum() not in places or not atom.GetAtomicNum():
            known = ", ".join(symbol(a) for a in atoms if a)
            raise BadInput(f"SMILES {smiles!r}", expected=f"elements that the model knows ({known})", got=atom.GetSymbol())
        types[i] = places[atom.GetAtomicNum()]
    for bond in mol.GetBonds():
        kind = bond.GetBondType().name
        if kind not in kinds:
            raise BadInput(f"SMILES {smiles!r}", expected=f"bonds that the model knows ({', '.join(bonds[1:])})", got=kind)
        a, b = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        links[a, b] = links[b, a] = kinds[kind]
    return types, links


def symbol(number: int) -> str:
    return rdkit().GetPeriodicTable().GetElementSymbol(int(number)) if number else "*"


def decode(types: np.ndarray, links: np.ndarray, atoms: Sequence[int], bonds: Sequence[str]) -> Any:
    """An unsanitised molecule; where the two halves of `links` differ, the lower one counts. Padding is left out with its bonds, unless it
    is bonded to an atom: then it counts as carbon."""
    chem, lower = rdkit(), np.tril(links, -1)
    present = types > 0
    bonded = (lower + lower.T)[:, present].any(1)
    mol, place = chem.RWMol(), {}
    for i in np.flatnonzero(present | bonded):
        place[int(i)] = mol.AddAtom(chem.Atom(int(atoms[types[i]]) or 6))
    for a, b in np.argwhere(lower > 0).tolist():
        if a in place and b in place:
            mol.AddBond(place[a], place[b], getattr(chem.BondType, bonds[lower[a, b]]))
    return mol


def made(types: np.ndarray, links: np.ndarray, atoms: Sequence[int], bonds: Sequence[str]) -> tuple[str, str]:
    """(SMILES, repaired SMILES) of the largest connected part of what a generator made; "" where RDKit refuses it (or nothing is there)."""
    mol = largest(decode(types, links, atoms, bonds))
    if mol is None:
        return "", ""
    smiles = sanitised(mol)
    return smiles, smiles or sanitised(largest(repair(mol)))


def largest(mol: Any) -> Any:
    """The connected part with the most atoms, None of no atoms."""
    if mol is None or not mol.GetNumAtoms():
        return None
    parts = rdkit().GetMolFrags(mol, asMols=True, sanitizeFrags=False)
    return rdkit().RWMol(max(parts, key=lambda m: m.GetNumAtoms()))


def sanitised(mol: Any) -> str:
    """The SMILES of a molecule, "" where RDKit refuses it."""
    if mol is None:
        return ""
    chem, copy = rdkit(), rdkit().Mol(mol)
    try:
        chem.SanitizeMol(copy)
        smiles = chem.MolToSmiles(copy)
    except (ValueError, RuntimeError):
        return ""
    return smiles if smiles and chem.MolFromSmiles(smiles) is not None else ""


def repair(mol: Any) -> Any:
    """Takes, from each atom that has too many bonds, its strongest ones until it has not; aromatic bonds that can't be kekulised become
    single."""
    chem, mol = rdkit(), rdkit().RWMol(mol)
    for _ in range(mol.GetNumBonds() + 1):
        try:
            chem.SanitizeMol(mol, sanitizeOps=chem.SanitizeFlags.SANITIZE_PROPERTIES)
            break
        except ValueError as e:
            atom = mol.GetAtomWithIdx(int(re.findall(r"\d+", str(e)[str(e).find("#") :])[0]))
            bond = max(atom.GetBonds(), key=lambda b: b.GetBondTypeAsDouble())
            mol.RemoveBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx())
    try:
        chem.Kekulize(chem.Mol(mol))
    except ValueError:
        for bond in mol.GetBonds():
            if bond.GetIsAromatic():
                bond.SetBondType(chem.BondType.SINGLE)
                bond.SetIsAromatic(False)
        for atom in mol.GetAtoms():
            atom.SetIsAromatic(False)
    return mol
