"""Operator learning: observed pieces of trajectories in, their solutions at other times and their equations out.

Rivals share the batch that `model.py` documents. `data.py` reads trajectories, `symbols.py` has equations as words,
`sample.py` the sample data (solved in `fields.py`, in `families.py` with `starts.py` and `solvers.py`, in `fluids.py`), `metrics.py` the
scores, `draw.py` the pictures; `task` below ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform, file_stem

if TYPE_CHECKING:
    pass


class OperatorLearning(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "operator-learning"
    metric = "relative_l2"
    higher_is_better = False
    samples = ("odes", "pdes", "pdes20", "fluids")
    recipe_keys = ("noise", "noise_targets", "add_term", "drop_term")
    published_defaults: Mapping[str, Any] = {}
    demo_defaults: Mapping[str, Any] = {"noise": 0.02, "add_term": 0.15, "drop_term": 0.15}
    scored = ("target", "query", "dims", "words", "id")

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("data").Prepare(preprocessing, recipe)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """A .csv a sample with columns t, u_0, u_1, ... and, where the model writes equations, a .txt with them in infix and prefix."""
        paths = []
        for row in self.rows(prediction, batch, names):
            stem = file_stem(row["id"])
            lines = [",".join(["t", *(f"u_{k}" for k in range(len(row["u"][0])))])]
            lines += [",".join(f"{x:.8g}" for x in (t, *u)) for t, u in zip(row["t"], row["u"], strict=True)]
            paths.append(folder / f"{stem}.csv")
            paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
            if row["words"]:
                paths.append(folder / f"{stem}.txt")
                paths[-1].write_text(f"{row['equation']}\n{row['words']}\n", encoding="utf-8")
        return paths

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """More for a report: matplotlib figures by caption (the error by time)."""
        return self.part("draw").details(predictions, batches, names)


task = OperatorLearning()
