"""Graph prediction: graphs in (molecules, networks), a value or class of each graph or of each node out.

Rivals share the batch that `model.py` documents. `data.py` reads graphs, `sample.py` generates some, `encodings.py` has positional
encodings and padding, `metrics.py` the scores, `draw.py` the pictures; `task` below ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform

if TYPE_CHECKING:
    pass


class GraphPrediction(Task):
    """The task object; see formarium.task.Task for what each method promises. Its metric, `score`, is balanced accuracy for classes and
    1 - MAE / (mean absolute deviation from the median) for values."""

    name = "graph-prediction"
    class_key = "target"
    metric = "score"
    higher_is_better = True
    samples = ("molecules", "pattern", "cluster")
    example_names = ("value",)

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return isinstance(value, Mapping) or hasattr(value, "edge_index") or hasattr(value, "is_directed")

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("encodings").Prepare(preprocessing)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return self.part("encodings").collate(samples)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """More for a report: matplotlib figures by caption."""
        return self.part("draw").details(predictions, batches, names)


task = GraphPrediction()
