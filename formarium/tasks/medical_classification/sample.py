"""Sample data with known truth, generated from a seed: fundus-like images with or without lesions, OCT-like volumes with or without fluid.

An image shows a reddish disk of tissue, a bright optic disc at one side, vessels that branch from it; the unhealthy ones have a
cluster of small bright lesions. A volume shows three bright layers with random bumps along its depth (its last axis), under speckle; the
unhealthy ones have one to three dark pockets of fluid between two layers. Brightness, place and curvature vary, so that no single pixel
tells.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.medical_classification.data import Arrays

SIDE, DEPTH = 32, 16
COUNTS = {"train": (640, 480), "val": (240, 240)}  # images, volumes
NAMES = ["healthy", "disease"]


def sample(name: str, seed: int = 0) -> Data:
    """ "fundus": 640 training and 240 held-out 32x32 images; "oct": 480 and 240 volumes of 32x32x16; "eyes": both. Half of each are
    healthy."""
    if name not in ("eyes", "fundus", "oct"):
        raise UnknownName("sample", name, ["eyes", "fundus", "oct"])
    return _made(name, seed)


@cache
def _made(name: str, seed: int) -> Data:
    if name == "eyes":
        halves = [_made(half, seed).splits for half in ("fundus", "oct")]
        splits = {split: _joined([h[split] for h in halves]) for split in COUNTS}
    else:
        make, rank = (fundus, 2) if name == "fundus" else (oct_volume, 3)
        splits = {}
        for number, (split, counts) in enumerate(COUNTS.items()):
            count = counts[rank - 2]
            values = [make(np.random.default_rng((seed, number, rank, i)), i % 2 == 1) for i in range(count)]
            splits[split] = Arrays(values, [rank] * count, np.arange(count) % 2, [f"{name} {split} {i}" for i in range(count)])
    return Data(name, "medical-classification", {**splits}, {"num_classes": 2}, NAMES, [], {"sample": name, "seed": seed})


def _joined(parts: list[Any]) -> Arrays:
    labels = np.concatenate([p.labels for p in parts])
    return Arrays(*([x for p in parts for x in getattr(p, key)] for key in ("values", "ranks")), labels, [i for p in parts for i in p.ids])


def fundus(rng: np.random.Generator, ill: bool, side: int = SIDE) -> np.ndarray:
    """A fundus-like image, uint8 [side, side, 3]."""
    y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1
    centre = rng.uniform(-0.05, 0.05, 2)
    radius = np.hypot(y - centre[0], x - centre[1])
    inside = 1 / (1 + np.exp((radius - rng.uniform(0.92, 1.0)) * 25))
    tissue = rng.uniform(0.4, 0.55) * (1 - 0.25 * radius**2) + 0.05 * gaussian_filter(rng.standard_normal((side, side)), 4) * 8
    eye = rng.choice([-1.0, 1.0])
    disc = np.array([rng.uniform(-0.15, 0.15), eye * rng.uniform(0.4, 0.6)])
    glow = rng.uniform(0.3, 0.45) * np.exp(-((((y - disc[0]) ** 2 + (x - disc[1]) ** 2) / 0.02) ** 1.5))
    vessels = gaussian_filter(_vessels(rng, disc, eye, side), 0.55)
    light = tissue - rng.uniform(0.3, 0.5) * np.minimum(vessels, 0.5)
    if ill:
        while True:
            middle = rng.uniform(-0.6, 0.6, 2)
            if np.hypot(*(middle - disc)) > 0.45 and np.hypot(*middle) < 0.65:
                break
        for at in middle + rng.normal(0, 0.16, (int(rng.integers(4, 9)), 2)):
            width = rng.uniform(0.05, 0.09)
            glow = glow + rng.uniform(0.35, 0.55) * np.exp(-((y - at[0]) ** 2 + (x - at[1]) ** 2) / (2 * width**2))
    colour = np.array([1.45, 0.85, 0.45]) * rng.uniform(0.9, 1.1, 3)
    pale = np.array([1.0, 0.9, 0.6])
    values = ((light[..., None] * colour + glow[..., None] * pale) * inside[..., None]) + 0.015 * rng.standard_normal((side, side, 3))
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def _vessels(rng: np.random.Generator, disc: np.ndarray, eye: float, side: int) -> np.ndarray:
    """Six curved vessels from the optic disc, each with a branch, as a map of how often a pixel was passed."""
    out = np.zeros((side, side))
    t = np.linspace(0, 1, 3 * side // 2)
    angle = (np.pi if eye > 0 else 0.0) + (np.arange(6) - 2.5) * 0.75 + rng.uniform(-0.25, 0.25, 6)
    bend, length = rng.uniform(-1.2, 1.2, 6), rng.uniform(0.8, 1.5, 6)
    start = np.stack([np.zeros(6), rng.uniform(0.3, 0.5, 6)])[..., None]  # of a vessel, of its branch along it
    turn = np.stack([np.zeros(6), rng.choice([-0.7, 0.7], 6)])[..., None]
    theta = angle[:, None] + bend[:, None] * t + turn * (t > start)  # 2 vessels points
    step = length[:, None] / len(t) * np.stack([np.sin(theta), np.cos(theta)])
    path = (disc[:, None, None, None] + np.cumsum(step, -1) + 1) / 2 * (side - 1)
    rows, columns = path.round().astype(int)
    kept = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side) & (t >= start)
    out[rows[kept], columns[kept]] = 1
    return out


def oct_volume(rng: np.random.Generator, ill: bool, side: int = SIDE, depth: int = DEPTH) -> np.ndarray:
    """An OCT-like volume, float32 [side, side, depth] in [0, 1]; the last axis runs into the tissue."""
    z = np.arange(depth) / depth
    bumps = gaussian_filter(rng.standard_normal((3, side, side)), (0, 6, 6)) * 6 * 0.035
    tilt = rng.uniform(-0.06, 0.06, 2)
    y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1
    top = rng.uniform(0.1, 0.3) + tilt[0] * y + tilt[1] * x
    gaps = np.cumsum([0.0, rng.uniform(0.22, 0.3), rng.uniform(0.22, 0.3)])
    layers = top + gaps[:, None, None] + bumps  # 3 h w: how deep each layer lies
    bright, width = rng.uniform(0.3, 0.5, 3), rng.uniform(0.035, 0.06, 3)
    values = sum(b * np.exp(-((z - s[..., None]) ** 2) / (2 * w**2)) for s, b, w in zip(layers, bright, width, strict=True))
    between = (z > layers[0][..., None]) & (z < layers[2][..., None])
    values = (values + between * rng.uniform(0.25, 0.55)) * rng.uniform(0.55, 1.1)
    for _ in range(rng.integers(0, 4)):  # vessels throw shadows
        at, turn = rng.uniform(-0.8, 0.8), rng.uniform(0, np.pi)
        across = np.abs(np.sin(turn) * y + np.cos(turn) * x - at)
        values = values * (1 - rng.uniform(0.3, 0.6) * np.exp(-((across / 0.09) ** 2)))[..., None]
    for _ in range(rng.integers(1, 4) if ill else 0):
        cy, cx = rng.uniform(-0.6, 0.6, 2)
        which = int(rng.integers(2))
        middle = (layers[which] + layers[which + 1]) / 2
        size, thick = rng.uniform(0.35, 0.55), rng.uniform(0.1, 0.14)
        flat = ((y - cy) ** 2 + (x - cx) ** 2) / size**2
        pocket = flat[..., None] + (z - middle[..., None]) ** 2 / thick**2
        values = values * (1 - 0.9 / (1 + np.exp(((pocket - 1) * 8).clip(-30, 30))))
    speckle = rng.gamma(60, 1 / 60, values.shape)
    return (values * speckle + 0.03 * rng.random(values.shape)).clip(0, 1).astype(np.float32)


def write_folder(data: Data, root: str | Path) -> Path:
    """Write sample data as the folders that `read` takes: root/train/class/name.png and name.nii.gz, root/val/..."""
    import nibabel

    root = Path(root)
    for split, dataset in data.splits.items():
        for i in range(len(dataset)):
            s = dataset[i]
            folder = root / split / data.names[s["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            if "image" in s:
                Image.fromarray(s["image"]).save(folder / f"{i:05d}.png")
            else:
                nibabel.save(nibabel.Nifti1Image(s["volume"], np.eye(4)), str(folder / f"{i:05d}.nii.gz"))
    return root
