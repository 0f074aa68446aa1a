"""Speech separation: a recording of several people talking at once in, one recording a speaker out.

Rivals share the batch that `model.py` documents. `data.py` reads mixtures and their sources, `sample.py` has the sample data, `metrics.py`
the scores and the files written, `draw.py` the pictures; `task` below ties them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.task import BatchTransform, Data, Sample, Task, Transform
from formarium.task import Dataset as Dataset

if TYPE_CHECKING:
    from PIL.Image import Image


class SpeechSeparation(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "speech-separation"
    metric = "si_sdr_improvement"
    higher_is_better = True
    samples = ("voices", "three-voices")
    recipe_keys = ("crop", "remix", "gain")
    published_defaults: Mapping[str, Any] = {"crop": 4.0, "remix": 1.0, "gain": 2.5}
    demo_defaults: Mapping[str, Any] = {"remix": 1.0, "gain": 2.5}

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return self.part("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("data").Prepare(preprocessing, recipe)

    def augment_batch(self, recipe: Mapping[str, Any], model_args: Mapping[str, Any]) -> BatchTransform | None:
        return self.part("data").Remix(recipe["remix"], recipe.get("gain", 0.0)) if recipe.get("remix") else None

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return self.part("metrics").rows(prediction, batch)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """One .wav a speaker of each mixture: name_speaker1.wav, name_speaker2.wav, ..."""
        return self.part("metrics").write(prediction, batch, folder)

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return self.part("metrics").baseline(data)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return self.part("draw").draw(prediction, batch)


task = SpeechSeparation()
