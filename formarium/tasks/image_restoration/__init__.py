"""Image restoration: degraded images in, clean ones out: super-resolution, denoising, removal of JPEG artefacts.

Rivals share the batch that `model.py` documents. `data.py` reads folders of images or of pairs, `degrade.py` makes degraded images from
clean ones, `sample.py` has the sample data, `metrics.py` the scores (BasicSR's conventions), `draw.py` the pictures.
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
    return import_module(f"formarium.tasks.image_restoration.{module}")


class ImageRestoration(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "image-restoration"
    metric = "psnr_y"
    higher_is_better = True
    scored = ("target", "id", "upscale")
    samples = ("photos_x2", "photos_x3", "photos_x4", "photos_noise25", "photos_jpeg10")
    recipe_keys = ("patch", "flip", "turn")
    published_defaults: Mapping[str, Any] = {"patch": 64, "flip": 0.5, "turn": True}
    demo_defaults: Mapping[str, Any] = {"patch": 32, "flip": 0.5, "turn": True}

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
        return _at("degrade").Prepare(preprocessing, recipe)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return _at("data").collate(samples)

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        return _at("metrics").score(predictions, batches)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return _at("metrics").rows(prediction, batch)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """Each image as PNG, 8 bits a channel."""
        return _at("data").write(prediction, batch, folder)

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        return _at("metrics").baseline(data, seed)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return _at("draw").draw(prediction, batch)


task = ImageRestoration()
