"""Slide classification: whole slides in, as bags of tiles or of tile features, one label each out (multiple instance learning).

Models read the batch that `model.py` documents. `data.py` reads bags (npz, npy, h5, pt, folders of tile images) with a table of labels,
`sample.py` has the sample data, `metrics.py` the scores and the trivial rival, `draw.py` the pictures; `task` below ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform


class SlideClassification(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "slide-classification"
    metric = "auc"
    higher_is_better = True
    batch_size = 16
    samples = ("feature-bags", "ring-tiles")
    scored = ("label", "id")
    recipe_keys = ("tiles_per_slide", "turns")
    demo_defaults: Mapping[str, Any] = {}

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return self.part("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("data").Prepare(preprocessing, recipe)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """A JSON a slide, and where each of its tiles lies and how much attention it got as csv."""
        return [*super().write(prediction, batch, folder, names), *self.part("metrics").write_attention(prediction, batch, folder)]

    def examples(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[Any, Mapping[str, Any]]:
        return self.part("draw").examples(predictions, batches)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        return self.part("draw").details(predictions, batches, names)


task = SlideClassification()
