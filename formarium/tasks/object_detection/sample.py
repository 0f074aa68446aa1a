"""Sample data that is drawn from a seed: scenes of shapes on cluttered grounds, every box and mask known."""

from __future__ import annotations

import colorsys
import math
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.object_detection.coco import pycocotools
from formarium.tasks.object_detection.data import Scenes

SIDE = 64
NAMES = ["", "disc", "square", "triangle"]  # COCO's numbers start at 1


def sample(name: str, seed: int = 0) -> Data:
    """ "shapes": 64x64 scenes of 1 to 3 discs, squares and triangles, 1000 to train on and 200 to test on. UnknownName for others."""
    if name != "shapes":
        raise UnknownName("sample", name, ["shapes"])
    return _shapes(seed)


@cache
def _shapes(seed: int) -> Data:
    rng = np.random.default_rng([seed, 64])
    splits = {}
    for first, (split, count) in enumerate([("train", 1000), ("val", 200)]):
        entries = [_entry(rng, 10_000 * first + i + 1, f"scene {split} {i}") for i in range(count)]
        splits[split] = Scenes(entries, masks=True)
    return Data("shapes", "object-detection", {**splits}, {"num_classes": 4}, [*NAMES], [], {"sample": "shapes", "seed": seed})


def _entry(rng: np.random.Generator, number: int, name: str) -> dict[str, Any]:
    mask = pycocotools("mask")

    picture, labels, masks = scene(rng)
    truth, boxes = [], []
    for i, (label, m) in enumerate(zip(labels, masks, strict=True)):
        ys, xs = np.nonzero(m)
        left, top, right, bottom = (float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        code = mask.encode(np.asfortranarray(m.astype(np.uint8)))
        truth.append(
            {
                "id": number * 10 + i,
                "image_id": number,
                "category_id": label,
                "bbox": [left, top, right - left, bottom - top],
                "area": float(m.sum()),
                "iscrowd": 0,
                "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
            }
        )
        boxes.append([left, top, right, bottom])
    found = {"image": picture, "id": name, "image_id": number, "truth": truth, "masks": np.stack(masks)}
    return {**found, "boxes": np.array(boxes, dtype=np.float32), "labels": np.array(labels, dtype=np.int64)}


def scene(rng: np.random.Generator) -> tuple[np.ndarray, list[int], list[np.ndarray]]:
    """(picture uint8 [64, 64, 3], labels 1 .. 3, masks bool [64, 64]): later shapes hide earlier ones, no shape by more than a half."""
    corners = rng.uniform(40, 160, (3, 3, 3)).astype(np.uint8)
    picture = Image.fromarray(corners).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(2, 6)):  # thin strokes that are no shape
        x, y = rng.uniform(0, SIDE, 2)
        pen.line((x, y, *(rng.uniform(0, SIDE, 2))), fill=_grey(rng), width=1)
    labels: list[int] = []
    masks: list[np.ndarray] = []
    wanted = int(rng.integers(1, 4))
    for _ in range(20):
        if len(masks) == wanted:
            break
        label = int(rng.integers(1, 4))
        shape = Image.new("L", (SIDE, SIDE))
        outline(ImageDraw.Draw(shape), label, rng)
        own = np.asarray(shape) > 0
        left = [m & ~own for m in masks]
        if own.sum() < 40 or any(a.sum() < 0.5 * b.sum() for a, b in zip(left, masks, strict=True)):
            continue
        masks = [*left, own]
        labels.append(label)
        pixels = np.asarray(picture).copy()
        pixels[own] = _colour(label, rng)
        picture = Image.fromarray(pixels)
    values = np.asarray(picture).astype(np.float32) + rng.normal(0, 5, (SIDE, SIDE, 1))
    return values.clip(0, 255).astype(np.uint8), labels, masks


def outline(pen: ImageDraw.ImageDraw, label: int, rng: np.random.Generator) -> None:
    """Fill a disc (1), a square (2) or a triangle (3) of random size, place and turn."""
    radius = rng.uniform(8, 15)
    x, y = rng.uniform(radius * 0.8, SIDE - radius * 0.8, 2)
    if label == 1:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        return
    corners = 4 if label == 2 else 3
    turn = rng.uniform(0, 2 * math.pi)
    radius *= 1.15
    at = [turn + 2 * math.pi * i / corners for i in range(corners)]
    pen.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in at], fill=255)


def _colour(label: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [3]: hues about a third of the circle apart from class to class, spread so widely that they overlap."""
    hue = (label / 3 + rng.normal(0, 0.12)) % 1
    r, g, b = colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 1), rng.uniform(0.6, 1))
    return np.array([255 * r, 255 * g, 255 * b]).astype(np.uint8)


def _grey(rng: np.random.Generator) -> tuple[int, int, int]:
    value = int(rng.uniform(60, 200))
    return value, value, value
