"""Video generation: clips in, clips out whose unknown part a model made: the frames to come, those between, a region, or everything.

Rivals share the batch that `model.py` documents. `data.py` reads and writes videos, `masks.py` says what is unknown, `sample.py` has the
sample data, `metrics.py` the scores, `draw.py` the pictures; `task` below ties them together.
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
    return import_module(f"formarium.tasks.video_generation.{module}")


class VideoGeneration(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "video-generation"
    metric = "psnr"
    higher_is_better = True
    samples = ("shapes", "digits")
    recipe_keys = ("hflip",)
    scored = ("video", "mask", "id")

    def read(self, path: str | Path, **options: Any) -> Data:
        return _at("data").read(path, **options)

    def sample(self, name: str, seed: int = 0) -> Data:
        return _at("sample").sample(name, seed)

    def inputs(self, paths: Sequence[str | Path]) -> Dataset:
        return _at("data").inputs(paths)

    def from_memory(self, value: Any, index: int) -> Sample:
        return _at("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return isinstance(value, Mapping) or (hasattr(value, "ndim") and value.ndim <= 4)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return _at("data").Prepare(preprocessing, recipe)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _at("data").collate(samples)

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        return _at("metrics").score(predictions, batches)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return _at("metrics").rows(prediction, batch)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        return _at("data").write(prediction, batch, folder)

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return _at("metrics").baseline(data, seed)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return _at("draw").draw(prediction, batch)


task = VideoGeneration()
