"""Sample data that packages ship: photographs from scikit-image and scikit-learn, degraded in the ways the task knows."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.image_classification.data import decode
from formarium.tasks.image_restoration.data import Arrays
from formarium.tasks.image_restoration.degrade import degrade, unit

TRAIN = {
    "astronaut": "skimage/data/astronaut.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "rocket": "skimage/data/rocket.jpg",
    "china": "sklearn/datasets/images/china.jpg",
    "flower": "sklearn/datasets/images/flower.jpg",
}
VAL = {"chelsea": "skimage/data/chelsea.png", "coffee": "skimage/data/coffee.png"}
HOW: dict[str, dict[str, Any]] = {
    **{f"photos_x{s}": {"degradation": "bicubic", "upscale": s} for s in (2, 3, 4)},
    "photos_noise25": {"degradation": "noise", "sigma": 25, "upscale": 1},
    "photos_jpeg10": {"degradation": "jpeg", "quality": 10, "upscale": 1},
    "photos_real_x4": {"degradation": "real", "upscale": 4},
}
TILE = 144  # clean pixels to a side of a training or test tile; a multiple of every factor


@cache
def sample(name: str, seed: int = 0) -> Data:
    """ "photos_x2", "photos_x3", "photos_x4": bicubic super-resolution. "photos_noise25": colour noise. "photos_jpeg10": JPEG artefacts.
    "photos_real_x4": super-resolution of images degraded at random in many ways.

    Five photographs cut into tiles of 144x144 to train on, two others (a cat, a cup of coffee) to test on. Test tiles are degraded as part
    of their photograph, once, by the seed (in photos_real_x4 each tile in its own way); noise on training tiles is drawn anew each time.
    """
    if name not in HOW:
        raise UnknownName("sample", name, HOW)
    how = HOW[name]
    train = [
        {"target": tile, "degrade": how, "id": f"{photo} {y},{x}"}
        for photo, file in TRAIN.items()
        for y, x, tile in _tiles(photograph(file), TILE)
    ]
    val = []
    rng = np.random.default_rng(seed)
    for photo, file in VAL.items():
        clean = photograph(file)
        clean = clean[: clean.shape[0] // TILE * TILE, : clean.shape[1] // TILE * TILE]
        targets, side = _tiles(clean, TILE), TILE // how["upscale"]
        if how["degradation"] == "real":
            images = [degrade(unit(tile), how, rng) for _, _, tile in targets]
        else:
            images = [tile for _, _, tile in _tiles(degrade(unit(clean), how, rng), side)]
        pairs = zip(targets, images, strict=True)
        val += [{"target": t, "image": i, "degrade": how, "id": f"{photo} {y},{x}"} for (y, x, t), i in pairs]
    splits = {"train": Arrays(train), "val": Arrays(val)}
    return Data(name, "image-restoration", {**splits}, {"upscale": how["upscale"]}, [], [], {"sample": name, "seed": seed})


def photograph(file: str) -> np.ndarray:
    """uint8 [height, width, 3] of a file inside an installed package."""
    package, _, inside = file.partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return decode(Path(spec.origin).parent / inside)


def _tiles(image: np.ndarray, side: int) -> list[tuple[int, int, np.ndarray]]:
    rows, columns = (range(0, s - side + 1, side) for s in image.shape[:2])
    return [(y, x, image[y : y + side, x : x + side]) for y in rows for x in columns]
