"""Time series classification: series of one or more channels in, class probabilities out.

Models share the batch that `model.py` documents. `data.py` reads and writes the archives' .ts files, `shapelets.py` finds the pieces that
tell classes apart, `sample.py` has the sample data, `metrics.py` the scores and rivals, `draw.py` the pictures; `task` ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform

if TYPE_CHECKING:
    import numpy as np


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

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return self.part("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return Prepare(preprocessing, recipe)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        return self.part("draw").details(predictions, batches, names)

    def examples(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[Any, Mapping[str, Any]]:
        return self.part("draw").examples(predictions, batches)


task = TimeSeriesClassification()
