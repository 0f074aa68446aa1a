"""Time series classification: series of one or more channels in, class probabilities out.

Models share the batch that `model.py` documents. `data.py` reads and writes the archives' .ts files, `shapelets.py` finds the pieces that
tell classes apart, `sample.py` has the sample data, `metrics.py` the scores and rivals, `draw.py` the pictures; `task` ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.task import Data, Dataset, Sample, Task, Transform

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


def _at(module: str) -> Any:
    return import_module(f"formarium.tasks.time_series_classification.{module}")


class Prepare:
    """A raw sample as the batch holds it; with a recipe, its values jittered ("jitter": deviation, in the series' own deviations) and
    scaled
    ("scaling": deviation of a factor for each channel)."""

    def __init__(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None):
        recipe = recipe or {}
        self.jitter, self.scaling = float(recipe.get("jitter", 0)), float(recipe.get("scaling", 0))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        x = sample["series"]
        if self.scaling:
            x = x * (1 + self.scaling * rng.standard_normal((len(x), 1)).astype("float32"))
        if self.jitter:
            x = x + self.jitter * x.std() * rng.standard_normal(x.shape).astype("float32")
        return {**sample, "series": x}


class TimeSeriesClassification(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "time-series-classification"
    metric = "accuracy"
    higher_is_better = True
    samples = ("motifs", "basic-motions", "japanese-vowels", "gun-point")
    recipe_keys = ("jitter", "scaling")

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
        return Prepare(preprocessing, recipe)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _at("data").collate(samples)

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        return _at("metrics").score(predictions, batches)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return _at("metrics").rows(prediction, batch, names)

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return _at("metrics").baseline(data, seed)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        return _at("draw").details(predictions, batches, names)

    def examples(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[Any, Mapping[str, Any]]:
        return _at("draw").examples(predictions, batches)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return _at("draw").draw(prediction, batch, names)


task = TimeSeriesClassification()
