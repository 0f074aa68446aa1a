"""Object detection: pictures in, boxes with classes (and where a model has them, instance masks) out, as COCO has them.

Rivals share the batch that `model.py` documents. `data.py` reads COCO instance files, `sample.py` draws scenes of shapes, `augment.py`
resizes, crops and flips, `metrics.py` has COCO's average precision, `draw.py` the pictures.
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
    return import_module(f"formarium.tasks.object_detection.{module}")


class ObjectDetection(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "object-detection"
    metric = "AP"
    samples = ("shapes",)
    recipe_keys = ("hflip", "scales", "crop")
    published_defaults: Mapping[str, Any] = {"hflip": 0.5}
    demo_defaults: Mapping[str, Any] = {"hflip": 0.5}
    scored = ("id", "image_id", "truth", "original_size")

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

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _at("data").collate(samples)

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        return _at("metrics").score(predictions, batches)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return _at("metrics").rows(prediction, batch, names)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """COCO's results json (detections.json in the folder), and one json a picture."""
        return [*super().write(prediction, batch, folder, names), _at("metrics").write_results(prediction, batch, folder)]

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return _at("metrics").baseline(data, seed)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """A figure of each class's average precision."""
        return _at("draw").details(predictions, batches, names)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return _at("draw").draw(prediction, batch, names)


task = ObjectDetection()
