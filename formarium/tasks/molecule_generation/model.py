"""What every generator of molecular graphs shares: the batch it takes, how its output becomes molecules, its checks.

A batch holds molecules of up to n heavy atoms
    atoms          int64 [batch, n], places in the model's list of elements; 0 is padding
    bonds          int64 [batch, n, n], symmetric, places in its list of bond types; 0 is none
    smiles         list[str], the same molecules as RDKit writes them
and where there is a target set (in training and evaluation)
    target_atoms, target_bonds, target_smiles   a molecule of it for each of the batch, drawn at random
    targets        all of its SMILES (a `Known`), and where the data name one `motif`, SMARTS of what they have in common
    known          all training molecules' SMILES and the target's, for novelty (in evaluation)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Model, check_tensor

CHEMBL_ATOMS = (0, 1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 35, 53)
CHEMBL_BONDS = ("ZERO", "SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")


class Molecules(NamedTuple):
    """smiles: list[str], what was made, as RDKit writes it, "" where RDKit refuses it. repaired: the same, and where RDKit refuses it what
    is left when bonds are taken from atoms that have too many. valid: bool [batch]. atoms: int64 [batch, n]. bonds: int64 [batch, n, n]."""

    smiles: list[str]
    repaired: list[str]
    valid: Tensor
    atoms: Tensor
    bonds: Tensor


class MoleculeGenerator(Model):
    """A network that makes atoms and bonds. Config has at least `atoms`, `bonds`, `max_atoms`. Subclasses write `logits(batch)`, giving
    atom logits [batch, n, len(atoms)] and bond logits [batch, n, n, len(bonds)]."""

    task = "molecule-generation"
    channel_axes = (3, 2)

    def __init__(self, config: Any):
        super().__init__(config)
        if config.atoms[0] != 0 or config.bonds[0] != "ZERO":
            raise BadInput("vocabulary", expected="padding first (0, ZERO)", got=f"{config.atoms[0]}, {config.bonds[0]}")
        self.set_preprocessing({})

    def adopt(self, card: Any, variant: str, preprocessing: Mapping[str, Any]) -> None:
        super().adopt(card, variant, preprocessing)
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Mapping[str, Any]) -> None:
        c = self.config
        self.preprocessing = {**preprocessing, "atoms": [*c.atoms], "bonds": [*c.bonds], "max_atoms": c.max_atoms}

    def one_hot(self, bonds: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """(bonds [batch, n, n, types], atoms [batch, n, types]) as floats."""
        return F.one_hot(bonds, len(self.config.bonds)).float(), F.one_hot(atoms, len(self.config.atoms)).float()

    def inputs_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.one_hot(batch["bonds"], batch["atoms"])

    def forward_batch(self, batch: Batch) -> Any:
        return self(*self.inputs_of(batch))

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def predict(self, batch: Batch) -> Molecules:
        """The likeliest atoms and bonds, as molecules."""
        from formarium.tasks.molecule_generation.chemistry import made

        atoms, bonds = (x.argmax(-1) for x in self.logits(batch))
        found = [made(a, b, self.config.atoms, self.config.bonds) for a, b in zip(atoms.cpu().numpy(), bonds.cpu().numpy(), strict=True)]
        smiles, repaired = [a for a, _ in found], [b for _, b in found]
        return Molecules(smiles, repaired, torch.tensor([s != "" for s in smiles]), atoms, bonds)

    # examples and checks ----------------------------------------------------------------------------------------------

    def example(self, batch: int = 1) -> tuple[Tensor, Tensor]:
        return self.inputs_of(self.example_batch(batch, seed=int(torch.randint(1 << 30, ()))))

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        bonds, atoms = self.example(1)
        return {"fewer atoms": (bonds[:, 1:, 1:], atoms[:, 1:])}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        """Chains of random elements, closed to rings now and then."""
        c, rng = self.config, np.random.default_rng(seed)

        def graphs() -> tuple[Tensor, Tensor]:
            atoms, bonds = np.zeros((batch, c.max_atoms), np.int64), np.zeros((batch, c.max_atoms, c.max_atoms), np.int64)
            for a, b in zip(atoms, bonds, strict=True):
                n = int(rng.integers(2, c.max_atoms + 1))
                a[:n] = rng.integers(1, len(c.atoms), size=n)
                ends = [(i, i + 1) for i in range(n - 1)] + ([(0, n - 1)] if n > 2 and rng.random() < 0.5 else [])
                for i, j in ends:
                    b[i, j] = b[j, i] = 1
            return torch.from_numpy(atoms).to(self.device), torch.from_numpy(bonds).to(self.device)

        atoms, bonds = graphs()
        target_atoms, target_bonds = graphs()
        names = [f"example {i}" for i in range(batch)]
        found = {"atoms": atoms, "bonds": bonds, "target_atoms": target_atoms, "target_bonds": target_bonds}
        return {**found, "smiles": ["CCO"] * batch, "target_smiles": ["CCN"] * batch, "id": names}

    def check_input(self, bonds: Any, atoms: Any) -> None:
        c, n = self.config, self.config.max_atoms
        check_tensor("bonds", bonds, "batch n n types", sizes={1: n, 2: n, 3: len(c.bonds)})
        check_tensor("atoms", atoms, "batch n types", sizes={0: bonds.shape[0], 1: n, 2: len(c.atoms)})
