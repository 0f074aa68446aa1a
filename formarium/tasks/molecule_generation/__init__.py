"""Molecule generation: molecules in (SMILES, SDF), new ones out, in the direction of a target's ligands where there are some.

Rivals share the batch that `model.py` documents. `chemistry.py` and `scores.py` are RDKit's part, `data.py` reads molecules, `sample.py`
puts some together, `metrics.py` has the metrics, files and pictures; `task` below ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.errors import BadInput
from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform

if TYPE_CHECKING:
    from PIL.Image import Image


class MoleculeGeneration(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "molecule-generation"
    metric = "on_target"
    higher_is_better = True
    samples = ("fragments", "fluorides")
    scored = ("smiles", "target_smiles", "targets", "motif", "known", "id")

    def from_memory(self, value: Any, index: int) -> Sample:
        if hasattr(value, "GetNumAtoms"):  # an RDKit molecule
            return {"id": f"input {index}", "smiles": self.part("chemistry").rdkit().MolToSmiles(value)}
        if isinstance(value, Mapping) and "smiles" in value:
            return {"id": f"input {index}", **value}
        raise BadInput(f"input {index}", expected="a SMILES, an RDKit molecule, or a dict with smiles", got=type(value).__name__)

    def is_single(self, value: Any) -> bool:
        return isinstance(value, Mapping) or hasattr(value, "GetNumAtoms")

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("data").Prepare(preprocessing)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        return self.part("metrics").write(prediction, batch, folder, names)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return self.part("metrics").draw(prediction, batch, names)


task = MoleculeGeneration()
