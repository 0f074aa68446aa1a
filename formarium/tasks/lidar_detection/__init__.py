"""Lidar detection: sweeps of points in, rotated boxes out.

Rivals share the batch that `model.py` documents (`queries.py`: of detectors that predict a set). `clouds.py` reads files of points,
`data.py` folders with labels, `frames.py` makes several sweeps one cloud, `paste.py` lets objects join other sweeps, `sample.py` generates
streets, `metrics.py` has the scores, `draw.py` the pictures; `task` below ties them together.
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


class LidarDetection(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "lidar-detection"
    metric = "bev_ap"
    higher_is_better = True
    samples = ("street", "moving-street")
    recipe_keys = (
        "flip", "rotation", "scaling", "translation", "min_points", "paste", "paste_points", "unpasted_epochs", "plain_epochs",
    )  # fmt: skip
    scored = ("boxes", "label", "id")

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return isinstance(value, Mapping) or getattr(value, "ndim", 0) == 2

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("data").Prepare(recipe)

    def training_transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any], data: Data, epochs: float) -> Transform:
        return self.part("data").prepare_training(recipe, data, epochs)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        return self.part("metrics").write(prediction, batch, folder, names)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        return self.part("draw").details(predictions, batches, names)


task = LidarDetection()
