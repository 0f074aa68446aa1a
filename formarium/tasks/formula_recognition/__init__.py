"""Formula recognition: images or strokes of handwritten formulas in, LaTeX out.

Rivals share the batch that `model.py` documents. `data.py` reads captioned images and InkML (`inkml.py`), `latex.py` has the tokens,
`sample.py` the sample data, `metrics.py` the scores, `draw.py` the pictures; `task` below ties them together.
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


class FormulaRecognition(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "formula-recognition"
    metric = "exprate"
    higher_is_better = True
    samples = ("formulas",)
    recipe_keys = ("scale", "margin")
    published_defaults: Mapping[str, Any] = {"scale": (0.7, 1.4)}
    demo_defaults: Mapping[str, Any] = {"margin": 6}
    scored = ("tokens", "id")

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return self.part("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("data").Prepare(preprocessing, recipe)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """A .tex file a sample, in the form that CROHME's scorers take: a comment with the name, then the formula between dollars."""
        paths = []
        for row in self.rows(prediction, batch, names):
            paths.append(folder / f"{file_stem(row['id'])}.tex")
            paths[-1].write_text(f"%{row['id']}\n${row['latex']}$\n", encoding="utf-8")
        return paths

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """More for a report: matplotlib figures by caption (formulas read right, by length)."""
        return self.part("draw").details(predictions, batches, names)


task = FormulaRecognition()
