"""Sample data with a known truth: slides that differ in a few of their tiles only."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data, Sample
from formarium.tasks.image_classification.data import decode
from formarium.tasks.slide_classification.data import Arrays

SIDE, TILES = 32, 16
RINGS = {0: (0, 1), 1: (3, 6)}  # tiles with a ring-shaped nucleus in a slide, least and most
SIZES = {"train": 200, "val": 120}


def sample(name: str, seed: int = 0) -> Data:
    """ "ring-tiles": 200 training and 120 held-out slides of 16 tiles, 32x32. The tissue is real (an immunohistochemical section of colon
    that scikit-image ships; training and held-out tiles come from different parts of it), the nuclei are drawn: discs, clusters of three,
    and rings in 3 to 6 tiles of a positive slide, in 0 or 1 of a negative one. Slides differ in stain, in the size of their nuclei and in
    the share of clusters, whose mean looks like a ring's, so that the mean tile tells little. `rings` of a raw sample says which
    tiles have a ring.

    "feature-bags": 240 and 120 bags of 30 to 60 feature vectors of width 32, normal with an offset of the bag's own; 3 to 5 of a
    positive bag, 0 or 1 of a negative one, are shifted along one direction. `key` of a raw sample says which.
    """
    makers = {"ring-tiles": _rings, "feature-bags": _features}
    if name not in makers:
        raise UnknownName("sample", name, makers)
    return makers[name](seed)


def _data(name: str, seed: int, splits: dict[str, list[Sample]], features: int) -> Data:
    args = {"num_classes": 2, "features": features}
    found = {k: Arrays(v) for k, v in splits.items()}
    return Data(name, "slide-classification", {**found}, args, ["negative", "positive"], [], {"sample": name, "seed": seed})


def section() -> np.ndarray:
    """The section of tissue, uint8 [512, 512, 3]."""
    spec = find_spec("skimage")
    assert spec is not None and spec.origin is not None
    return decode(Path(spec.origin).parent / "data" / "ihc.png")


@cache
def _rings(seed: int) -> Data:
    rng, tissue = np.random.default_rng(seed), section()
    parts = {"train": tissue[:, :340], "val": tissue[:, 348:]}
    splits: dict[str, list[Sample]] = {}
    for split, count in SIZES.items():
        splits[split] = []
        for i in range(count):
            label = i % 2
            ring = np.zeros(TILES, dtype=bool)
            ring[: rng.integers(RINGS[label][0], RINGS[label][1] + 1)] = True
            ring = rng.permutation(ring)
            stain, size, clustered = rng.uniform(0.8, 1.2, 3), rng.uniform(5.0, 8.0), rng.random(TILES) < rng.random()
            tiles = nuclei(np.stack([_crop(parts[split], rng) for _ in ring]), ring, clustered, size, stain, rng)
            coords = np.stack([np.arange(TILES) % 4, np.arange(TILES) // 4], 1).astype(np.float32) * SIDE
            splits[split].append({"tiles": tiles, "coords": coords, "label": label, "id": f"{split} slide {i}", "rings": ring})
    return _data("ring-tiles", seed, splits, 0)


def _crop(part: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = (rng.integers(0, size - SIDE + 1) for size in part.shape[:2])
    return np.rot90(part[y : y + SIDE, x : x + SIDE], rng.integers(4)).astype(np.float32)


def nuclei(
    tiles: np.ndarray, ring: np.ndarray, clustered: np.ndarray, size: float, stain: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Tiles, each with nuclei drawn into it, soft-edged and slightly oval: a ring where `ring` says so, else three small discs where
    `clustered` does, else a disc of a radius about `size` pixels; then everything stained. tiles: float [n, 32, 32, 3] in 0..255. Returns
    uint8."""
    n = len(tiles)
    scale = size / 6.5 + rng.normal(0, 0.06, n)  # of everything in a slide alike
    centre, squeeze, angle = rng.uniform(10, SIDE - 10, (2, n)), rng.uniform(0.85, 1.15, n), rng.uniform(0, np.pi, n)
    y, x = (g[None] - c[:, None, None] for g, c in zip(np.mgrid[:SIDE, :SIDE], centre, strict=True))  # n h w
    cos, sin, squeeze, scale = (v[:, None, None] for v in (np.cos(angle), np.sin(angle), squeeze, scale))
    u, v = (x * cos + y * sin) * squeeze / scale, (y * cos - x * sin) / squeeze / scale
    r = np.hypot(u, v)

    def soft(distance: np.ndarray) -> np.ndarray:
        return np.clip(distance * scale + 0.5, 0, 1)

    shapes = [soft(6.2 - r), soft(8.0 - r) * soft(r - 4.9)]
    shapes.append(np.max([soft(3.5 - np.hypot(u - 5.6 * np.cos(a), v - 5.6 * np.sin(a))) for a in np.arange(3) * 2 * np.pi / 3], 0))
    kind = np.where(ring, 1, np.where(clustered, 2, 0))[:, None, None]
    inside = np.choose(kind, shapes) * rng.uniform(0.75, 0.95, n)[:, None, None]
    colour = np.array([58, 48, 110]) + rng.normal(0, 10, (n, 1, 1, 3))
    out = tiles * (1 - inside[..., None]) + colour * inside[..., None]
    return (out * stain).round().clip(0, 255).astype(np.uint8)


@cache
def _features(seed: int, width: int = 32, shift: float = 4.0) -> Data:
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=width)
    direction /= np.linalg.norm(direction)
    splits: dict[str, list[Sample]] = {}
    for split, count in (("train", 240), ("val", 120)):
        splits[split] = []
        for i in range(count):
            label, n = i % 2, int(rng.integers(30, 61))
            x = rng.normal(size=(n, width)) + rng.normal(scale=0.5, size=width)
            key = np.zeros(n, dtype=bool)
            key[rng.permutation(n)[: rng.integers(3, 6) if label else rng.integers(0, 2)]] = True
            x[key] += shift * direction
            coords = np.stack([np.arange(n) % 8, np.arange(n) // 8], 1).astype(np.float32) * 224
            one = {"features": x.astype(np.float32), "coords": coords, "label": label, "id": f"{split} bag {i}", "key": key}
            splits[split].append(one)
    return _data("feature-bags", seed, splits, width)
