"""Image restoration: degraded images in, clean ones out: super-resolution, denoising, removal of JPEG artefacts.

Rivals share the batch that `model.py` documents. `data.py` reads folders of images or of pairs, `degrade.py` makes degraded images from
clean ones (`real.py` those that look like real ones), `adversarial.py` trains with a discriminator, `sample.py` has the sample data,
`metrics.py` the scores (BasicSR's conventions), `draw.py` the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.task import Data as Data
from formarium.task import Dataset as Dataset
from formarium.task import Sample, Task, Transform

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageRestoration(Task):
    """The task object; see formarium.task.Task for what each method promises."""

    name = "image-restoration"
    metric = "psnr_y"
    higher_is_better = True
    scored = ("target", "id", "upscale")
    samples = ("photos_x2", "photos_x3", "photos_x4", "photos_noise25", "photos_jpeg10", "photos_real_x4")
    recipe_keys = ("patch", "flip", "turn", "sharpen")
    published_defaults: Mapping[str, Any] = {"patch": 64, "flip": 0.5, "turn": True}
    demo_defaults: Mapping[str, Any] = {"patch": 32, "flip": 0.5, "turn": True}

    def from_memory(self, value: Any, index: int) -> Sample:
        return self.part("data").from_memory(value, index)

    def is_single(self, value: Any) -> bool:
        return self.part("data").is_single(value)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        return self.part("degrade").Prepare(preprocessing, recipe)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        return self.part("metrics").rows(prediction, batch)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """Each image as PNG, 8 bits a channel."""
        return self.part("data").write(prediction, batch, folder)

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        return self.part("draw").draw(prediction, batch)


task = ImageRestoration()
