"""Segmentation of medical volumes and slices: NIfTI in, labels out.

Rivals share the batch that `model.py` documents. `data.py` reads and writes NIfTI in three layouts, `prepare.py` normalises and crops,
`sample.py` generates tumours with known masks, `metrics.py` has Dice and the 95% Hausdorff distance, `draw.py` the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform

if TYPE_CHECKING:
    pass


class MedicalSegmentation(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "medical-segmentation"
    metric = "dice"
    higher_is_better = True
    scored = ("label", "affine", "id", "regions")
    samples = ("tumours", "tumours_2d", "organs", "tumours_unlabelled")
    recipe_keys = ("patch", "flip", "foreground", "intensity_scale", "intensity_shift")
    published_defaults: Mapping[str, Any] = {"flip": 0.5}
    demo_defaults: Mapping[str, Any] = {"flip": 0.5, "intensity_scale": 0.1, "intensity_shift": 0.1}
    example_names = ("tumour core", "whole tumour", "enhancing tumour")

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        """An array is one image, channels first."""
        return isinstance(value, Mapping) or hasattr(value, "ndim")

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("prepare").Prepare(preprocessing, recipe)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return self.part("prepare").collate(samples)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """Each label volume as NIfTI (.nii.gz), with the affine of its image."""
        return self.part("data").write(prediction, batch, folder)


task = MedicalSegmentation()
