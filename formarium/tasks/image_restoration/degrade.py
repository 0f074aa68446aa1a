"""Clean images to degraded ones by the field's recipes, and what happens to both on their way into a batch.

bicubic   shrunk `upscale` times as MATLAB's imresize does, rounded to 8 bits (classical super-resolution)
noise     white Gaussian noise of standard deviation `sigma` (of 255), not clipped
jpeg      compressed and read again at a `quality` of 1 to 95
real      blurred, resized, noisy and compressed twice at random, `upscale` times smaller (`real.py`)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from formarium.errors import BadInput, UnknownName
from formarium.nn.resizing import imresize
from formarium.task import Sample
from formarium.tasks.image_restoration.real import degrade_real, jpeg, sharpened

KINDS = ("bicubic", "noise", "jpeg", "real")
SHRINKING = ("bicubic", "real")  # those for which `upscale` counts
CONTEXT = 16  # degraded pixels around a training patch, so that its border is degraded as in the whole image


def degrade(clean: np.ndarray, how: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    """clean: float32 [height, width, channels] in [0, 1], sides multiples of `upscale`. how: degradation, and upscale, sigma or quality.

    Returns float32 [height / upscale, width / upscale, channels]. UnknownName for another degradation.
    """
    kind = how["degradation"]
    if kind == "bicubic":
        scale = how["upscale"]
        small = imresize(clean, clean.shape[0] // scale, clean.shape[1] // scale)
        return (np.round(small.clip(0, 1) * 255) / 255).astype(np.float32)
    if kind == "noise":
        return (clean + rng.standard_normal(clean.shape, dtype=np.float32) * np.float32(how["sigma"] / 255)).astype(np.float32)
    if kind == "jpeg":
        return jpeg(clean, int(how["quality"]))
    if kind == "real":
        return degrade_real(clean, how["upscale"], rng)
    raise UnknownName("degradation", str(kind), KINDS)


class Prepare:
    """A raw sample (image, target, or target alone) to what a batch holds.

    preprocessing: upscale, degradation and its strength (sigma, quality), channels (1 for grey). A sample with a `degrade` entry says
    itself how. recipe, when training: patch (the degraded side, in pixels), flip (probability, each way, or one for upside down and one for
    left to right), turn (by quarters, at random), sharpen ("real" images are made from the clean one sharpened; the target isn't).
    """

    def __init__(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None):
        self.how, self.recipe = dict(preprocessing), None if recipe is None else dict(recipe)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        how = {**self.how, **sample.get("degrade", {})}
        shrinks = how.get("degradation", "bicubic") in SHRINKING
        scale = how["upscale"] = how.get("upscale", 1) if shrinks or "image" in sample else 1
        if "target" not in sample:
            return {"image": self.planes(sample["image"]), "id": sample["id"], "upscale": scale}
        clean = sample["target"]
        given = sample.get("image")
        if given is not None:
            must_fit(sample["id"], given, clean, scale)
        else:
            clean = clean[: clean.shape[0] // scale * scale, : clean.shape[1] // scale * scale]
        if self.recipe is None:
            image = given if given is not None else degrade(unit(clean), how, rng)
        else:
            image, clean = self.patch(clean, given, how, scale, rng, sample["id"])
        return {"image": self.planes(image), "target": self.planes(clean), "id": sample["id"], "upscale": scale}

    def patch(
        self, clean: np.ndarray, given: np.ndarray | None, how: Mapping[str, Any], scale: int, rng: np.random.Generator, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """A random patch of both, mirrored and turned at random."""
        recipe = self.recipe or {}
        side = recipe.get("patch", 64)
        h, w = clean.shape[0] // scale, clean.shape[1] // scale
        if min(h, w) < side:
            raise BadInput(
                name, expected=f"at least {side * scale} pixels to a side", got=f"{w * scale}x{h * scale}", fix="a smaller patch"
            )
        y, x = int(rng.integers(h - side + 1)), int(rng.integers(w - side + 1))
        if given is not None:
            image = given[y : y + side, x : x + side]
        else:
            top, left = (max(0, a - CONTEXT) // 16 * 16 for a in (y, x))  # whole JPEG blocks
            around = clean[top * scale : (y + side + CONTEXT) * scale, left * scale : (x + side + CONTEXT) * scale]
            source = sharpened(unit(around)) if recipe.get("sharpen") and how["degradation"] == "real" else unit(around)
            image = degrade(source, how, rng)[y - top : y - top + side, x - left : x - left + side]
        clean = clean[y * scale : (y + side) * scale, x * scale : (x + side) * scale]
        flips = rng.random(2) < np.asarray(recipe.get("flip", 0.5))
        turns = int(rng.integers(4)) if recipe.get("turn", True) else 0
        return tuple(_turned(a, flips, turns) for a in (image, clean))  # type: ignore[return-value]

    def planes(self, image: np.ndarray) -> np.ndarray:
        """float32 [channels, height, width] in [0, 1]; grey where the network takes one channel."""
        values = unit(image)
        if self.how.get("channels", 3) == 1 and values.shape[2] == 3:
            values = (values @ np.float32([0.299, 0.587, 0.114]))[..., None]
        return np.ascontiguousarray(values.transpose(2, 0, 1))


def unit(image: np.ndarray) -> np.ndarray:
    """uint8 or float [h, w, channels] (or [h, w]) to float32 in [0, 1]."""
    image = image[..., None] if image.ndim == 2 else image
    return image.astype(np.float32) / np.float32(255) if image.dtype == np.uint8 else image.astype(np.float32)


def must_fit(name: str, image: np.ndarray, clean: np.ndarray, scale: int) -> None:
    wanted = (image.shape[0] * scale, image.shape[1] * scale)
    if clean.shape[:2] != wanted:
        raise BadInput(
            f"the pair {name}",
            expected=f"a clean image {scale} times as large, {wanted[1]}x{wanted[0]}",
            got=f"{clean.shape[1]}x{clean.shape[0]}",
        )


def _turned(image: np.ndarray, flips: np.ndarray, turns: int) -> np.ndarray:
    image = image[::-1] if flips[0] else image
    image = image[:, ::-1] if flips[1] else image
    return np.rot90(image, turns)
