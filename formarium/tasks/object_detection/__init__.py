"""Object detection: pictures in, boxes with classes (and where a model has them, instance masks) out, as COCO has them.

Rivals share the batch that `model.py` documents. `data.py` reads COCO instance files, `sample.py` draws scenes of shapes, `augment.py`
resizes, crops and flips, `metrics.py` has COCO's average precision, `draw.py` the pictures.
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


class ObjectDetection(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "object-detection"
    metric = "AP"
    samples = ("shapes",)
    recipe_keys = ("hflip", "scales", "crop")
    published_defaults: Mapping[str, Any] = {"hflip": 0.5}
    demo_defaults: Mapping[str, Any] = {"hflip": 0.5}
    scored = ("id", "image_id", "truth", "original_size")

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return self.part("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("augment").Prepare(preprocessing, recipe)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """COCO's results json (detections.json in the folder), and one json a picture."""
        return [*super().write(prediction, batch, folder, names), self.part("metrics").write_results(prediction, batch, folder)]

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """A figure of each class's average precision."""
        return self.part("draw").details(predictions, batches, names)


task = ObjectDetection()
