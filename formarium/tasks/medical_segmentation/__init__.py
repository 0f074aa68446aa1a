"""Segmentation of medical volumes and slices: NIfTI in, labels out.

Rivals share the batch that `model.py` documents. `data.py` reads and writes NIfTI in three layouts, `prepare.py` normalises and crops,
`sample.py` generates tumours with known masks, `metrics.py` has Dice and the 95% Hausdorff distance, `draw.py` the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.task import Data, Dataset, Sample, Task, Transform

if TYPE_CHECKING:
    from PIL.Image import Image


def _at(module: str) -> Any:
    return import_module(f"formarium.tasks.medical_segmentation.{module}")


class MedicalSegmentation(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "medical-segmentation"
    metric = "dice"
    higher_is_better = True
    scored = ("label", "affine", "id", "regions")
    samples = ("tumours", "tumours_2d", "organs")
    recipe_keys = ("patch", "flip", "foreground", "intensity_scale", "intensity_shift")
    published_defaults: Mapping[str, Any] = {"flip": 0.5}
    demo_defaults: Mapping[str, Any] = {"flip": 0.5, "intensity_scale": 0.1, "intensity_shift": 0.1}
    example_names = ("tumour core", "whole tumour", "enhancing tumour")

    def read(self, path: str | Path, **options: Any) -> Data:
        return _at("data").read(path, **options)

    def sample(self, name: str, seed: int = 0) -> Data:
        return _at("sample").sample(name, seed)

    def inputs(self, paths: Sequence[str | Path]) -> Dataset:
        return _at("data").inputs(paths)

    def from_memory(self, value: Any, index: int) -> Sample:
        return _at("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        """An array is one image, channels first."""
        return isinstance(value, Mapping) or hasattr(value, "ndim")

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return _at("prepare").Prepare(preprocessing, recipe)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _at("prepare").collate(samples)

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        return _at("metrics").score(predictions, batches)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return _at("metrics").rows(prediction, batch, names)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """Each label volume as NIfTI (.nii.gz), with the affine of its image."""
        return _at("data").write(prediction, batch, folder)

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return _at("metrics").baseline(data, seed)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return _at("draw").draw(prediction, batch, names)


task = MedicalSegmentation()
