"""Point cloud registration: two clouds in, correspondences and the motion of one onto the other out.

Rivals share the batch that `model.py` documents. `data.py` reads pairs, `sample.py` generates some, `metrics.py` has the scores,
`draw.py` the pictures; `task` below ties them together.
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


class PointCloudRegistration(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "point-cloud-registration"
    metric = "registration_recall"
    higher_is_better = True
    samples = ("bumps",)
    recipe_keys = ("noise", "rotation")
    scored = ("source", "source_count", "transform", "id")

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return isinstance(value, Mapping) or (
            isinstance(value, tuple) and len(value) == 2 and all(getattr(v, "ndim", 0) == 2 for v in value)
        )

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("data").Prepare(preprocessing, recipe)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        return self.part("metrics").write(prediction, batch, folder, names)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        return self.part("draw").details(predictions, batches, names)


task = PointCloudRegistration()
