"""Image classification: folders of images in, class probabilities out.

Rivals share the batch that `model.py` documents. `data.py` reads folders, `sample.py` has the sample data, `augment.py` the field's
augmentations, `metrics.py` the scores, `draw.py` the pictures; `task` below ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.task import BatchTransform, Data, Dataset, Sample, Task, Transform

if TYPE_CHECKING:
    from PIL.Image import Image


def _at(module: str) -> Any:
    return import_module(f"formarium.tasks.image_classification.{module}")


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

    def read(self, path: str | Path, **options: Any) -> Data:
        return _at("data").read(path, **options)

    def sample(self, name: str, seed: int = 0) -> Data:
        return _at("sample").sample(name, seed)

    def inputs(self, paths: Sequence[str | Path]) -> Dataset:
        return _at("data").inputs(paths)

    def from_memory(self, value: Any, index: int) -> Sample:
        return _at("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return _at("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return _at("augment").Prepare(preprocessing, recipe)

    def augment_batch(self, recipe: Mapping[str, Any], model_args: Mapping[str, Any]) -> BatchTransform | None:
        return _at("augment").batch_transform(recipe, model_args["num_classes"])

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _at("data").collate(samples)

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        return _at("metrics").score(predictions, batches)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return _at("metrics").rows(prediction, batch, names)

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return _at("metrics").baseline(data, seed)

    def examples(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[Any, Mapping[str, Any]]:
        return _at("draw").examples(predictions, batches)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return _at("draw").draw(prediction, batch, names)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """More for a report: matplotlib figures by caption (the confusion matrix)."""
        return _at("draw").details(predictions, batches, names)


task = ImageClassification()
