"""Tabular classification: tables with labelled and unlabelled rows in, class probabilities of the unlabelled rows out.

Models read the batch that `model.py` documents. `data.py` reads csv and parquet, `prior.py` draws the synthetic tables that networks
are trained on, `sample.py` has the sample data, `metrics.py` the scores and rivals, `draw.py` the pictures, `estimator.py` the
scikit-learn estimator; `task` below ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform

if TYPE_CHECKING:
    import numpy as np


def _as_it_is(sample: Sample, rng: np.random.Generator) -> Sample:
    return sample


class TabularClassification(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "tabular-classification"
    metric = "accuracy"
    higher_is_better = True
    samples = ("prior", "iris", "wine", "breast-cancer", "prior-published")
    scored = ("label", "context", "rows", "classes", "id")

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return self.part("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return _as_it_is

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        return self.part("metrics").write(prediction, batch, folder, names)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        return self.part("draw").details(predictions, batches, names)


task = TabularClassification()
