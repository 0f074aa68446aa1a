"""Weakly supervised object localisation: learn from class labels alone where an image's object is; boxes are for evaluation only.

Rivals share the batch that `model.py` documents. `data.py` reads folders with boxes, CUB-200-2011 and VOC annotations, `sample.py` has the
sample data, `metrics.py` the scores, `draw.py` the pictures; `task` below ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform


class ObjectLocalisation(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "object-localisation"
    metric = "gt_known_loc"
    higher_is_better = True
    scored = ("label", "boxes", "visible", "pixels", "size", "id")
    samples = ("textured-objects",)
    recipe_keys = ("random_crop", "hflip", "color_jitter")
    published_defaults: Mapping[str, Any] = {"random_crop": True, "hflip": 0.5}
    demo_defaults: Mapping[str, Any] = {"hflip": 0.5}

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return self.part("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("data").Prepare(preprocessing, recipe)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """A VOC annotation (the box in the file's own pixels) and the map as a PNG for each sample."""
        return self.part("metrics").write(prediction, batch, folder, names)

    def examples(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[Any, Mapping[str, Any]]:
        """Of those batches that still hold their images, the first."""
        held = next((i for i, b in enumerate(batches) if "image" in b), 0)
        return predictions[held], batches[held]


task = ObjectLocalisation()
