"""From raw frames to what the model's batch holds: the whole crop resized, and the field's augmentations for training.

Recipe keys: train_frames (how many frames of a video a training sample has, drawn at random), hflip (probability, of the whole video),
strong (probability with which a frame goes through the strong augmentation below).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from formarium.task import Sample


class Prepare:
    """sample["frames"] uint8 [frames, h, w, 3] -> float32 [frames, 3, height, width] in [0, 1]. Faces are stretched to the size."""

    def __init__(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None):
        size = preprocessing.get("size", 224)
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        self.recipe = recipe

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        frames, r = sample["frames"], self.recipe
        if r is not None:
            count = min(int(r.get("train_frames", 1)), len(frames))
            frames = frames[np.sort(rng.choice(len(frames), count, replace=False))]
            if r.get("hflip") and rng.random() < r["hflip"]:
                frames = frames[:, :, ::-1]
        frames = np.stack([resized(f, self.size) for f in frames])
        if r is not None and r.get("strong"):
            frames = np.stack([strong(f, rng) if rng.random() < r["strong"] else f for f in frames])
        return {**sample, "frames": np.ascontiguousarray(frames.transpose(0, 3, 1, 2)).astype(np.float32) * np.float32(1 / 255)}


def resized(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 3]: by areas where it shrinks, bilinear where it grows."""
    if frame.shape[:2] == size:
        return frame
    shrinks = frame.shape[0] >= size[0] and frame.shape[1] >= size[1]
    how = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((size[1], size[0]), how))


def strong(frame: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each by chance: quarter turns, transposition, flips, noise, a small shift with scale and rotation, one of four changes of contrast,
    another hue. uint8 [height, width, 3] in and out."""

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    square = frame.shape[0] == frame.shape[1]
    if square and chance(0.2):
        frame = np.rot90(frame, rng.integers(4))
    if square and chance(0.2):
        frame = frame.transpose(1, 0, 2)
    if chance(0.5):
        frame = frame[:, ::-1]
    if chance(0.5):
        frame = frame[::-1]
    if chance(0.2):
        noise = rng.normal(0, np.sqrt(rng.uniform(10, 50)), frame.shape)
        frame = (frame + noise).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(frame))
    if chance(0.2):
        picture = _moved(picture, rng)
    if chance(0.2):
        kinds = (_equalised, _sharpened, _embossed, _brightened)
        picture = kinds[rng.integers(4)](picture, rng)
    if chance(0.2):
        picture = _coloured(picture, rng)
    return np.asarray(picture)


def _moved(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    w, h = picture.size
    angle, scale = np.deg2rad(rng.uniform(-45, 45)), 1 / rng.uniform(0.9, 1.1)
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    dx, dy = rng.uniform(-0.0625, 0.0625, 2) * (w, h)
    x, y = w / 2 + dx, h / 2 + dy
    matrix = (c, s, w / 2 - c * x - s * y, -s, c, h / 2 + s * x - c * y)
    return picture.transform((w, h), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _equalised(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Contrast-limited adaptive histogram equalisation of the luminance."""
    from skimage.exposure import equalize_adapthist

    y, cb, cr = picture.convert("YCbCr").split()
    equal = (equalize_adapthist(np.asarray(y), clip_limit=0.01) * 255).round().astype(np.uint8)
    return Image.merge("YCbCr", (Image.fromarray(equal), cb, cr)).convert("RGB")


def _sharpened(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Sharpness(picture).enhance(1 + 2 * rng.uniform(0.2, 0.5))


def _embossed(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.blend(picture, picture.filter(ImageFilter.EMBOSS), rng.uniform(0.2, 0.5))


def _brightened(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.8, 1.2))
    return ImageEnhance.Contrast(picture).enhance(rng.uniform(0.8, 1.2))


def _coloured(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    hsv = np.asarray(picture.convert("HSV")).astype(np.int64)
    shift = np.array([rng.uniform(-14, 14), rng.uniform(-30, 30), rng.uniform(-20, 20)]).astype(np.int64)
    hue = (hsv[..., :1] + shift[0]) % 256
    rest = (hsv[..., 1:] + shift[1:]).clip(0, 255)
    return Image.fromarray(np.concatenate([hue, rest], -1).astype(np.uint8), "HSV").convert("RGB")
