"""Classification of medical images: folders of 2D images and 3D volumes in, class probabilities out.

Rivals share the batch that `model.py` documents. `data.py` reads folders of PNG, JPEG, TIFF, DICOM, NIfTI and NumPy files, of both ranks in
one data set; `prepare.py` resizes, augments and makes batches, `sample.py` generates fundus-like images and OCT-like volumes, `metrics.py`
has AUC, accuracy, F1 and Cohen's kappa, `draw.py` the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform


class MedicalClassification(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "medical-classification"
    metric = "auc"
    higher_is_better = True
    scored = ("label", "rank", "id")
    samples = ("eyes", "fundus", "oct")
    recipe_keys = (
        *("crop_scale", "crop_ratio", "hflip", "shift", "randaugment", "color_jitter", "random_erasing"),
        *("intensity_scale", "intensity_shift"),
    )
    published_defaults: Mapping[str, Any] = {"crop_scale": (0.2, 1.0), "hflip": 0.5}
    demo_defaults: Mapping[str, Any] = {"shift": 2, "hflip": 0.5}

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return self.part("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("prepare").Prepare(preprocessing, recipe)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return self.part("prepare").collate(samples)

    def examples(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[Any, Mapping[str, Any]]:
        return self.part("draw").examples(predictions, batches)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """More for a report: matplotlib figures by caption (ROC curves, the confusion matrix)."""
        return self.part("draw").details(predictions, batches, names)


task = MedicalClassification()
