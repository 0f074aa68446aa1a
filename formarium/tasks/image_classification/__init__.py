"""Image classification: folders of images in, class probabilities out.

Rivals share the batch that `model.py` documents. `data.py` reads folders, `sample.py` has the sample data, `augment.py` the field's
augmentations, `metrics.py` the scores, `draw.py` the pictures; `task` below ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from formarium.task import BatchTransform, Sample, Task, Transform
from formarium.task import Data as Data
from formarium.task import Dataset as Dataset

if TYPE_CHECKING:
    pass


class ImageClassification(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "image-classification"
    metric = "accuracy"
    higher_is_better = True
    scored = ("label", "id")
    samples = ("digits", "textures")
    recipe_keys = (
        *("crop_scale", "crop_ratio", "hflip", "shift", "randaugment", "color_jitter", "random_erasing"),
        *("mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "label_smoothing"),
    )
    published_defaults: Mapping[str, Any] = {"crop_scale": (0.08, 1.0), "hflip": 0.5}  # what every ImageNet recipe does without saying
    demo_defaults: Mapping[str, Any] = {"shift": 2}

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return self.part("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("augment").Prepare(preprocessing, recipe)

    def augment_batch(self, recipe: Mapping[str, Any], model_args: Mapping[str, Any]) -> BatchTransform | None:
        return self.part("augment").batch_transform(recipe, model_args["num_classes"])

    def examples(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[Any, Mapping[str, Any]]:
        return self.part("draw").examples(predictions, batches)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """More for a report: matplotlib figures by caption (the confusion matrix)."""
        return self.part("draw").details(predictions, batches, names)


task = ImageClassification()
