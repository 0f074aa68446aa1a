"""Speech recognition: sound files in, their words out.

Rivals share the batch that `model.py` documents. `vocabulary.py` turns text into tokens and back, `data.py` reads recordings and their
transcripts, `sample.py` has the sample data, `metrics.py` the word error rate, `draw.py` the pictures; `task` below ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.task import Data, Sample, Task, Transform
from formarium.task import Dataset as Dataset

if TYPE_CHECKING:
    from PIL.Image import Image


class SpeechRecognition(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "speech-recognition"
    class_key = "text"
    metric = "wer"
    higher_is_better = False
    samples = ("digits",)
    recipe_keys = ("time_masks", "time_mask_share", "frequency_masks", "frequency_mask_width", "speed")
    published_defaults: Mapping[str, Any] = {"time_masks": 5, "time_mask_share": 0.05, "frequency_masks": 2, "frequency_mask_width": 27}

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return self.part("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("data").Prepare(preprocessing, recipe)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return self.part("metrics").rows(prediction, batch)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """One .txt a sample with its transcript, and one .json with the rest."""
        return self.part("metrics").write(prediction, batch, folder)

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return self.part("metrics").baseline(data)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """More for a report: which words were taken for which."""
        return self.part("draw").details(predictions, batches)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return self.part("draw").draw(prediction, batch)


task = SpeechRecognition()
