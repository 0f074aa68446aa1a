"""Motion generation: captions in, human motions out, as HumanML3D's features, joints, BVH and animations.

Rivals share the batch that `model.py` documents. `skeleton.py` turns joints into features and back, `data.py` reads and writes, `bvh.py`
knows the animators' format, `text.py` has word vectors, `sample.py` the sample data, `metrics.py` the scores, `draw.py` the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.errors import BadInput
from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform

if TYPE_CHECKING:
    from PIL.Image import Image


class MotionGeneration(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "motion-generation"
    class_key = "group"
    metric = "r_precision"
    higher_is_better = True
    samples = ("actions",)

    def from_memory(self, value: Any, index: int) -> Sample:
        if isinstance(value, Mapping):
            if "caption" not in value and "motion" not in value:
                raise BadInput(f"input {index}", expected="a caption, a motion, or both", got=", ".join(map(str, value)) or "nothing")
            return {"id": f"input {index}", "caption": "", **value}
        return super().from_memory(value, index)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("data").Prepare(preprocessing, recipe)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return self.part("metrics").rows(prediction, batch)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        return self.part("data").write(prediction, batch, folder)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return self.part("draw").draw(prediction, batch)


task = MotionGeneration()
