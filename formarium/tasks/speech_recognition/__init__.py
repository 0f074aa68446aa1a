"""Speech recognition: sound files in, their words out.

Rivals share the batch that `model.py` documents. `vocabulary.py` turns text into tokens and back, `data.py` reads recordings and their
transcripts, `sample.py` has the sample data, `metrics.py` the word error rate, `draw.py` the pictures; `task` below ties them together.
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
    return import_module(f"formarium.tasks.speech_recognition.{module}")


class SpeechRecognition(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "speech-recognition"
    class_key = "text"
    metric = "wer"
    higher_is_better = False
    samples = ("digits",)
    recipe_keys = ("time_masks", "time_mask_share", "frequency_masks", "frequency_mask_width", "speed")
    published_defaults: Mapping[str, Any] = {"time_masks": 5, "time_mask_share": 0.05, "frequency_masks": 2, "frequency_mask_width": 27}

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
        return _at("data").Prepare(preprocessing, recipe)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _at("data").collate(samples)

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        return _at("metrics").score(predictions, batches)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return _at("metrics").rows(prediction, batch)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """One .txt a sample with its transcript, and one .json with the rest."""
        return _at("metrics").write(prediction, batch, folder)

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return _at("metrics").baseline(data)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """More for a report: which words were taken for which."""
        return _at("draw").details(predictions, batches)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return _at("draw").draw(prediction, batch)


task = SpeechRecognition()
