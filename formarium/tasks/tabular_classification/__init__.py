"""Tabular classification: tables with labelled and unlabelled rows in, class probabilities of the unlabelled rows out.

Models read the batch that `model.py` documents. `data.py` reads csv and parquet, `prior.py` draws the synthetic tables that networks
are trained on, `sample.py` has the sample data, `metrics.py` the scores and rivals, `draw.py` the pictures, `estimator.py` the
scikit-learn estimator; `task` below ties them together.
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
    return import_module(f"formarium.tasks.tabular_classification.{module}")


def _as_it_is(sample: Sample, rng: np.random.Generator) -> Sample:
    return sample


class TabularClassification(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "tabular-classification"
    metric = "accuracy"
    higher_is_better = True
    samples = ("prior", "iris", "wine", "breast-cancer", "prior-published")
    scored = ("label", "context", "rows", "classes", "id")

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
        return _as_it_is

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _at("data").collate(samples)

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        return _at("metrics").score(predictions, batches)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return _at("metrics").rows(prediction, batch, names)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        return _at("metrics").write(prediction, batch, folder, names)

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return _at("metrics").baseline(data, seed)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        return _at("draw").details(predictions, batches, names)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return _at("draw").draw(prediction, batch, names)


task = TabularClassification()
