"""Sample data that packages ship: handwritten digits, and crops of textures from photographs. Real images, offline."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.image_classification.data import Arrays, decode

SIDE = 32


def sample(name: str, seed: int = 0) -> Data:
    """ "digits": 1797 digits of 43 writers (scikit-learn), 8x8 enlarged to 32x32, one in five held out by the seed, class by class.

    "textures": 2000 training and 600 held-out 32x32 crops of ten textures in photographs that scikit-image and scikit-learn ship. Crops
    for training and for testing come from different parts of a photograph, with a gap between. Colour and brightness are
    drawn anew for each crop, and turned and mirrored at random, so that they tell little.
    """
    makers = {"digits": _digits, "textures": _textures}
    if name not in makers:
        raise UnknownName("sample", name, makers)
    return makers[name](seed)


def _data(name: str, seed: int, splits: dict[str, Arrays], names: list[str]) -> Data:
    return Data(name, "image-classification", {**splits}, {"num_classes": len(names)}, names, [], {"sample": name, "seed": seed})


@cache
def _digits(seed: int) -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = (digits.images / 16 * 255).round().astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(d).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for d in small])
    images = np.repeat(large[..., None], 3, axis=-1)
    rng, held = np.random.default_rng(seed), np.zeros(len(images), dtype=bool)
    for label in range(10):
        members = np.flatnonzero(digits.target == label)
        held[rng.permutation(members)[: round(0.2 * len(members))]] = True
    splits = {}
    for split, chosen in [("train", ~held), ("val", held)]:
        at = np.flatnonzero(chosen)
        splits[split] = Arrays(images[at], digits.target[at], [f"digit {i}" for i in at])
    return _data("digits", seed, splits, [str(i) for i in range(10)])


# class -> (file, left, top, right, bottom) of a part that holds the texture and nothing else
REGIONS = {
    "brick": ("skimage/data/brick.png", 0, 0, 512, 512),
    "foliage": ("sklearn/datasets/images/china.jpg", 0, 370, 640, 427),
    "fur": ("skimage/data/chelsea.png", 130, 0, 330, 95),
    "grass": ("skimage/data/grass.png", 0, 0, 512, 512),
    "gravel": ("skimage/data/gravel.png", 0, 0, 512, 512),
    "petals": ("sklearn/datasets/images/flower.jpg", 205, 65, 375, 225),
    "stars": ("skimage/data/hubble_deep_field.jpg", 0, 0, 1000, 872),
    "tissue": ("skimage/data/ihc.png", 0, 0, 512, 512),
    "vessels": ("skimage/data/retina.jpg", 450, 300, 950, 1100),
    "wood": ("skimage/data/coffee.png", 450, 120, 600, 400),
}
CROP, GAP = 40, 4


@cache
def _textures(seed: int) -> Data:
    names = sorted(REGIONS)
    rng = np.random.default_rng(seed)
    parts = {name: _parts(_region(name)) for name in names}
    splits = {}
    for split, count in [("train", 200), ("val", 60)]:
        images = [_crop(parts[name][split], rng) for name in names for _ in range(count)]
        ids = [f"{name} {split} {i}" for name in names for i in range(count)]
        splits[split] = Arrays(np.stack(images), np.repeat(np.arange(len(names)), count), ids)
    return _data("textures", seed, splits, names)


def _region(name: str) -> np.ndarray:
    file, left, top, right, bottom = REGIONS[name]
    package, _, inside = file.partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return decode(Path(spec.origin).parent / inside)[top:bottom, left:right]


def _parts(region: np.ndarray) -> dict[str, np.ndarray]:
    """A training and a test part of a region, cut across its longer side, a gap apart."""
    upright = region if region.shape[0] >= region.shape[1] else region.transpose(1, 0, 2)
    cut = max(round(0.7 * len(upright)), CROP) if len(upright) > 4 * CROP else len(upright) - CROP - GAP - 8
    return {"train": upright[:cut], "val": upright[cut + GAP :]}


def _crop(part: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = (rng.integers(0, size - CROP + 1) for size in part.shape[:2])
    crop = Image.fromarray(part[y : y + CROP, x : x + CROP]).resize((SIDE, SIDE), Image.Resampling.BOX)
    values = np.rot90(np.asarray(crop, dtype=np.float32) / 255, rng.integers(4))
    if rng.random() < 0.5:
        values = values[:, ::-1]
    if rng.random() < 0.5:
        values = np.repeat(values.mean(-1, keepdims=True), 3, axis=-1)
    values = (values - values.mean()) * rng.uniform(0.7, 1.3) / (values.std() + 0.05) * 0.18 + rng.uniform(0.4, 0.6)
    values = values * rng.uniform(0.75, 1.25, size=3)
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def write_folder(data: Data, root: str | Path) -> Path:
    """Write sample data as the folders that `read` takes: root/train/class/name.png and root/val/..."""
    root = Path(root)
    for split, dataset in data.splits.items():
        for i in range(len(dataset)):
            s = dataset[i]
            folder = root / split / data.names[s["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(s["image"]).save(folder / f"{i:05d}.png")
    return root
