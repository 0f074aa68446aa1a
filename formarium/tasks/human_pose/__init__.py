"""Human pose: pictures of people with a box each in, the places of 17 joints out (top-down, COCO's joints).

Rivals share the batch that `model.py` documents. `data.py` reads COCO keypoint files, `sample.py` renders articulated figures, `crop.py`
cuts people out and augments, `metrics.py` has OKS average precision, `draw.py` the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform
from formarium.tasks.human_pose.joints import JOINTS

if TYPE_CHECKING:
    pass


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

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return self.part("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("crop").Prepare(preprocessing, recipe)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """COCO's results json (keypoints.json in the folder), and one json a person."""
        return [*super().write(prediction, batch, folder, names), self.part("metrics").write_results(prediction, batch, folder)]

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """A figure of each joint's errors."""
        return self.part("draw").details(predictions, batches, names)


task = HumanPose()
