"""Speech separation: a recording of several people talking at once in, one recording a speaker out.

Rivals share the batch that `model.py` documents. `data.py` reads mixtures and their sources, `sample.py` has the sample data, `metrics.py`
the scores and the files written, `draw.py` the pictures; `task` below ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.task import BatchTransform, Data, Dataset, Sample, Task, Transform

if TYPE_CHECKING:
    from PIL.Image import Image


def _at(module: str) -> Any:
    return import_module(f"formarium.tasks.speech_separation.{module}")


class SpeechSeparation(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "speech-separation"
    metric = "si_sdr_improvement"
    higher_is_better = True
    samples = ("voices", "three-voices")
    recipe_keys = ("crop", "remix", "gain")
    published_defaults: Mapping[str, Any] = {"crop": 4.0, "remix": 1.0, "gain": 2.5}
    demo_defaults: Mapping[str, Any] = {"remix": 1.0, "gain": 2.5}

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

    def augment_batch(self, recipe: Mapping[str, Any], model_args: Mapping[str, Any]) -> BatchTransform | None:
        return _at("data").Remix(recipe["remix"], recipe.get("gain", 0.0)) if recipe.get("remix") else None

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _at("data").collate(samples)

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        return _at("metrics").score(predictions, batches)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return _at("metrics").rows(prediction, batch)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """One .wav a speaker of each mixture: name_speaker1.wav, name_speaker2.wav, ..."""
        return _at("metrics").write(prediction, batch, folder)

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return _at("metrics").baseline(data)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return _at("draw").draw(prediction, batch)


task = SpeechSeparation()
