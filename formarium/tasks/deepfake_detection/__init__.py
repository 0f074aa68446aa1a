"""Deepfake detection: videos of faces in, real or fake out.

Rivals share the batch that `model.py` documents. `data.py` reads films, folders of frames and the field's data sets, `prepare.py` turns
frames into what a network takes, `sample.py` makes faces and swaps them, `metrics.py` scores videos, `draw.py` makes the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from formarium.task import BatchTransform, Sample, Transform
from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.tasks.image_classification import ImageClassification


class DeepfakeDetection(ImageClassification):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "deepfake-detection"
    metric = "auc"
    batch_size = 16
    scored = ("label", "id")
    samples = ("swaps",)
    recipe_keys = ("train_frames", "strong", "hflip")
    published_defaults: Mapping[str, Any] = {"train_frames": 1}
    demo_defaults: Mapping[str, Any] = {"train_frames": 2, "hflip": 0.5}
    example_names = ("fake", "real")

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("prepare").Prepare(preprocessing, recipe)

    def augment_batch(self, recipe: Mapping[str, Any], model_args: Mapping[str, Any]) -> BatchTransform | None:
        return None

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """The ROC curve as a figure, by caption."""
        return self.part("draw").details(predictions, batches, names)


task = DeepfakeDetection()
