"""Human pose: pictures of people with a box each in, the places of 17 joints out (top-down, COCO's joints).

Rivals share the batch that `model.py` documents. `data.py` reads COCO keypoint files, `sample.py` renders articulated figures, `crop.py`
cuts people out and augments, `metrics.py` has OKS average precision, `draw.py` the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.task import Data, Dataset, Sample, Task, Transform
from formarium.tasks.human_pose.joints import JOINTS

if TYPE_CHECKING:
    from PIL.Image import Image


def _at(module: str) -> Any:
    return import_module(f"formarium.tasks.human_pose.{module}")


class HumanPose(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "human-pose"
    metric = "AP"
    samples = ("figures",)
    recipe_keys = ("hflip", "half_body", "rotation", "rescale", "shift_box")
    published_defaults: Mapping[str, Any] = {"hflip": 0.5, "half_body": 0.3, "rotation": 40.0, "rescale": 0.5, "shift_box": 0.3}
    demo_defaults: Mapping[str, Any] = {"hflip": 0.5, "rotation": 10.0, "rescale": 0.15}
    example_names = JOINTS
    scored = ("id", "box", "box_score", "truth", "keypoints", "visible", "centre", "extent")

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
        return _at("crop").Prepare(preprocessing, recipe)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _at("data").collate(samples)

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        return _at("metrics").score(predictions, batches)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return _at("metrics").rows(prediction, batch, names)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """COCO's results json (keypoints.json in the folder), and one json a person."""
        return [*super().write(prediction, batch, folder, names), _at("metrics").write_results(prediction, batch, folder)]

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return _at("metrics").baseline(data, seed)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """A figure of each joint's errors."""
        return _at("draw").details(predictions, batches, names)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return _at("draw").draw(prediction, batch, names)


task = HumanPose()
