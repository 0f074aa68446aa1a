"""Sample data generated from a seed: one textured object on a cluttered grey background, its box known exactly."""

from __future__ import annotations

from functools import cache

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.object_localisation.data import Boxed

SIDE = 56
NAMES = ("checks", "dots", "stripes across", "stripes upright")


def sample(name: str, seed: int = 0) -> Data:
    """ "textured-objects": 1200 training and 300 held-out images of 56x56 pixels. The class is the object's texture, one of four; its box
    covers 12 to 40% of the image (uniform), with an aspect of exp(U(-0.5, 0.5)), anywhere. The whole image overlaps no box by half."""
    if name != "textured-objects":
        raise UnknownName("sample", name, ("textured-objects",))
    return _textured_objects(seed)


@cache
def _textured_objects(seed: int) -> Data:
    rng = np.random.default_rng(seed)
    splits = {}
    for split, count in (("train", 1200), ("val", 300)):
        labels = rng.permutation(np.arange(count) % len(NAMES))
        made = [scene(int(label), rng) for label in labels]
        boxes = [box for _, box in made] if split == "val" else None  # nothing learns from boxes
        splits[split] = Boxed(np.stack([image for image, _ in made]), labels, [f"{split} {i}" for i in range(count)], boxes)
    return Data("textured-objects", "object-localisation", {**splits}, {"num_classes": len(NAMES)}, NAMES, [],
                {"sample": "textured-objects", "seed": seed})  # fmt: skip


def scene(label: int, rng: np.random.Generator, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 [side, side, 3], its box float32 [1, 4])"""
    area, aspect = rng.uniform(0.12, 0.40), np.exp(rng.uniform(-0.5, 0.5))
    w, h = (min(side, round(side * np.sqrt(area * f))) for f in (aspect, 1 / aspect))
    left, top = rng.integers(0, side - w + 1), rng.integers(0, side - h + 1)
    values = _clutter(side, rng)
    ys, xs = np.mgrid[:h, :w]
    inside = np.ones((h, w), dtype=bool)
    if rng.random() < 0.5:
        inside = ((ys + 0.5) / h * 2 - 1) ** 2 + ((xs + 0.5) / w * 2 - 1) ** 2 <= 1
        inside[h // 2, [0, -1]] = inside[[0, -1], w // 2] = True  # so that it touches every side of its box
    texture = _texture(label, xs, ys, rng)
    middle, swing = rng.uniform(0.4, 0.6), rng.uniform(0.15, 0.3)
    place = values[top : top + h, left : left + w]
    place[inside] = (middle + swing * texture)[inside]
    values = values[..., None] + rng.normal(0, 0.03, (side, side, 3))
    return (values.clip(0, 1) * 255).round().astype(np.uint8), np.array([[left, top, left + w, top + h]], dtype=np.float32)


def _texture(label: int, xs: np.ndarray, ys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """-1 or 1 by place."""
    width, dx, dy = int(rng.integers(2, 4)), *rng.integers(0, 8, 2)
    across, upright = ((ys + dy) // width) % 2, ((xs + dx) // width) % 2
    if NAMES[label] == "checks":
        on = (across + upright) % 2
    elif NAMES[label] == "dots":
        on = ((ys + dy) % (width + 2) < 2) & ((xs + dx) % (width + 2) < 2)
    else:
        on = across if NAMES[label] == "stripes across" else upright
    return np.where(on, 1.0, -1.0)


def _clutter(side: int, rng: np.random.Generator) -> np.ndarray:
    """Grey blobs of several sizes, and flat patches with edges."""
    values = np.full((side, side), rng.uniform(0.35, 0.65))
    for smooth in _smoothers(side):
        blob = smooth @ rng.standard_normal((side, side)) @ smooth.T
        values += 0.05 * blob / blob.std()
    for _ in range(6):
        y, x = rng.integers(0, side - 6, 2)
        h, w = rng.integers(4, 14, 2)
        values[y : y + h, x : x + w] += rng.uniform(-0.12, 0.12)
    return values


@cache
def _smoothers(side: int) -> list[np.ndarray]:
    """Matrices that blur an axis by a normal curve of 1.5, 4 and 9 pixels."""
    gap = np.arange(side)[:, None] - np.arange(side)
    return [np.exp(-0.5 * (gap / scale) ** 2) for scale in (1.5, 4.0, 9.0)]
