"""Video generation: clips in, clips out whose unknown part a model made: the frames to come, those between, a region, or everything.

Rivals share the batch that `model.py` documents. `data.py` reads and writes videos, `masks.py` says what is unknown, `sample.py` has the
sample data, `metrics.py` the scores, `draw.py` the pictures; `task` below ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform

if TYPE_CHECKING:
    from PIL.Image import Image


class VideoGeneration(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "video-generation"
    metric = "psnr"
    higher_is_better = True
    samples = ("shapes", "digits")
    recipe_keys = ("hflip",)
    scored = ("video", "mask", "id")

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return isinstance(value, Mapping) or (hasattr(value, "ndim") and value.ndim <= 4)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("data").Prepare(preprocessing, recipe)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return self.part("metrics").rows(prediction, batch)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        return self.part("data").write(prediction, batch, folder)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return self.part("draw").draw(prediction, batch)


task = VideoGeneration()
