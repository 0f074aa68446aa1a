"""Semantic segmentation: pictures in, a class for every pixel out.

Rivals share the batch that `model.py` documents. `data.py` reads pictures with masks beside them (and ADE20K's and Cityscapes' folders),
`sample.py` makes mosaics of real textures, `prepare.py` resizes, crops and flips, `metrics.py` has the mean intersection over union,
`draw.py` the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform


class SemanticSegmentation(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "semantic-segmentation"
    metric = "miou"
    batch_size = 16
    samples = ("mosaics",)
    recipe_keys = ("hflip", "crop", "scale", "color_jitter")
    published_defaults: Mapping[str, Any] = {"hflip": 0.5, "scale": (0.5, 2.0), "crop": 512, "color_jitter": 0.4}
    demo_defaults: Mapping[str, Any] = {"hflip": 0.5}
    scored = ("label", "size", "id")
    class_key = "main_class"

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return self.part("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("prepare").Prepare(preprocessing, recipe)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """Each label map as an indexed PNG: pixel values are class numbers, the palette is for eyes."""
        return self.part("data").write(prediction, batch, folder)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """A figure of each class's intersection over union."""
        return self.part("draw").details(predictions, batches, names)


task = SemanticSegmentation()
