"""Sample data with known truth: mosaics of real textures (crops of photographs that scikit-image and scikit-learn ship)."""

from __future__ import annotations

from functools import cache

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data, Sample
from formarium.tasks.image_classification.sample import REGIONS
from formarium.tasks.image_classification.sample import sample as images

SIDE, CLASSES = 64, 6
TRAIN, VAL = 240, 60


class Mosaics:
    """Pictures of 2 to 4 textures that meet along the borders of random cells, with the class of every pixel."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, ids: list[str]):
        self.images, self.labels, self.ids = images, labels, ids

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return {"id": self.ids[index], "image": self.images[index], "label": self.labels[index]}


def sample(name: str, seed: int = 0) -> Data:
    """ "mosaics": 240 training and 60 held-out pictures, 64x64, of six textures; held-out textures are cut from other parts of the
    photographs.
    UnknownName for others."""
    if name != "mosaics":
        raise UnknownName("sample data", name, ("mosaics",))
    return _mosaics(seed)


@cache
def _mosaics(seed: int) -> Data:
    textures = images("textures", seed)
    names = sorted(REGIONS)[:CLASSES]
    splits = {}
    for split, count in (("train", TRAIN), ("val", VAL)):
        rng = np.random.default_rng((seed, count))
        held = textures.splits[split]
        crops = [[held.images[i] for i in np.flatnonzero(held.labels == textures.names.index(n))] for n in names]
        made = [_mosaic(crops, rng) for _ in range(count)]
        splits[split] = Mosaics(
            np.stack([m[0] for m in made]), np.stack([m[1] for m in made]), [f"mosaic {split} {i}" for i in range(count)]
        )
    return Data("mosaics", "semantic-segmentation", splits, {"num_classes": len(names)}, names, source={"sample": "mosaics", "seed": seed})


def _mosaic(crops: list[list[np.ndarray]], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cells around 2 to 4 random points, each filled with one texture (its crop mirrored to cover it)."""
    points = rng.uniform(0, SIDE, (int(rng.integers(2, 5)), 2))
    y, x = np.mgrid[:SIDE, :SIDE] + rng.normal(0, 0.8, (2, SIDE, SIDE))
    cell = ((y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2).argmin(-1)
    classes = rng.permutation(len(crops))[: len(points)]
    image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    for i, c in enumerate(classes):
        crop = crops[c][int(rng.integers(len(crops[c])))]
        more = SIDE - crop.shape[0]
        image[cell == i] = np.pad(crop, ((0, more), (0, more), (0, 0)), mode="reflect")[cell == i]
    return image, classes[cell].astype(np.int64)
