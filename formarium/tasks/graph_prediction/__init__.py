"""Graph prediction: graphs in (molecules, networks), a value or class of each graph or of each node out.

Rivals share the batch that `model.py` documents. `data.py` reads graphs, `sample.py` generates some, `encodings.py` has positional
encodings and padding, `metrics.py` the scores, `draw.py` the pictures; `task` below ties them together.
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
    return import_module(f"formarium.tasks.graph_prediction.{module}")


class GraphPrediction(Task):
    """The task object; see formarium.task.Task for what each method promises. Its metric, `score`, is balanced accuracy for classes and
    1 - MAE / (mean absolute deviation from the median) for values."""

    name = "graph-prediction"
    class_key = "target"
    metric = "score"
    higher_is_better = True
    samples = ("molecules", "pattern", "cluster")
    example_names = ("value",)

    def read(self, path: str | Path, **options: Any) -> Data:
        return _at("data").read(path, **options)

    def sample(self, name: str, seed: int = 0) -> Data:
        return _at("sample").sample(name, seed)

    def inputs(self, paths: Sequence[str | Path]) -> Dataset:
        return _at("data").inputs(paths)

    def from_memory(self, value: Any, index: int) -> Sample:
        return _at("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return isinstance(value, Mapping) or hasattr(value, "edge_index") or hasattr(value, "is_directed")

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return _at("encodings").Prepare(preprocessing)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _at("encodings").collate(samples)

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        return _at("metrics").score(predictions, batches)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return _at("metrics").rows(prediction, batch, names)

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return _at("metrics").baseline(data, seed)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return _at("draw").draw(prediction, batch, names)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """More for a report: matplotlib figures by caption."""
        return _at("draw").details(predictions, batches, names)


task = GraphPrediction()
