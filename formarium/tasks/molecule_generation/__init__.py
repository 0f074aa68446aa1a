"""Molecule generation: molecules in (SMILES, SDF), new ones out, in the direction of a target's ligands where there are some.

Rivals share the batch that `model.py` documents. `chemistry.py` is RDKit's part, `data.py` reads molecules, `sample.py` puts some together,
`metrics.py` has the scores, files and pictures; `task` below ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.errors import BadInput
from formarium.task import Data, Dataset, Sample, Task, Transform

if TYPE_CHECKING:
    from PIL.Image import Image


def _at(module: str) -> Any:
    return import_module(f"formarium.tasks.molecule_generation.{module}")


class MoleculeGeneration(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "molecule-generation"
    metric = "valid_unique_novel"
    higher_is_better = True
    samples = ("fragments",)
    scored = ("smiles", "target_smiles", "known", "id")

    def read(self, path: str | Path, **options: Any) -> Data:
        return _at("data").read(path, **options)

    def sample(self, name: str, seed: int = 0) -> Data:
        return _at("sample").sample(name, seed)

    def inputs(self, paths: Sequence[str | Path]) -> Dataset:
        return _at("data").inputs(paths)

    def from_memory(self, value: Any, index: int) -> Sample:
        if hasattr(value, "GetNumAtoms"):  # an RDKit molecule
            return {"id": f"input {index}", "smiles": _at("chemistry").rdkit().MolToSmiles(value)}
        if isinstance(value, Mapping) and "smiles" in value:
            return {"id": f"input {index}", **value}
        raise BadInput(f"input {index}", expected="a SMILES, an RDKit molecule, or a dict with smiles", got=type(value).__name__)

    def is_single(self, value: Any) -> bool:
        return isinstance(value, Mapping) or hasattr(value, "GetNumAtoms")

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return _at("data").Prepare(preprocessing)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _at("data").collate(samples)

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        return _at("metrics").score(predictions, batches)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return _at("metrics").rows(prediction, batch, names)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        return _at("metrics").write(prediction, batch, folder, names)

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return _at("metrics").baseline(data, seed)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return _at("metrics").draw(prediction, batch, names)


task = MoleculeGeneration()
