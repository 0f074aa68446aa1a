""" "swaps": clips of drawn faces, generated from a seed, and what a face swap leaves in them.

A face is an ellipse with two eyes and a mouth, smooth shading and skin grain, moving before a background; every clip is compressed as a
whole. In a fake one the inner face is another person's, at half resolution (so without grain), its colour
matched, blended over a soft edge: what real swaps leave too.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.deepfake_detection.data import Clips
from formarium.tasks.deepfake_detection.model import FAKE, NAMES

SIDE, FRAMES = 64, 6
TRAIN, VAL = 144, 72


def sample(name: str, seed: int = 0) -> Data:
    """ "swaps": 144 clips to train on and 72 held out, of 6 frames, 64x64, half of either fake; no face is in both."""
    if name != "swaps":
        raise UnknownName("sample data set", name, ("swaps",))
    splits = {"train": clips(TRAIN, 2 * seed), "val": clips(VAL, 2 * seed + 1)}
    return Data("swaps", "deepfake-detection", dict(splits), {}, list(NAMES), [], {"sample": name})


@cache
def clips(count: int, seed: int) -> Clips:
    """`count` clips, fake and real in turn."""
    rng = np.random.default_rng([seed, 7919])
    labels = np.arange(count) % 2
    made = np.stack([clip(rng, bool(label == FAKE)) for label in labels])
    return Clips(made, labels.astype(np.int64), [f"{NAMES[label]} {i:03d}" for i, label in enumerate(labels)])


def clip(rng: np.random.Generator, fake: bool) -> np.ndarray:
    """uint8 [frames, side, side, 3]"""
    background, person, other = _background(rng), _face(rng), _face(rng)
    start, drift = rng.uniform(-4, 4, 2), rng.uniform(-0.5, 0.5, 2)
    quality, light = int(rng.integers(75, 96)), rng.uniform(0.85, 1.1)
    radius = rng.uniform(0.62, 0.8)
    frames = []
    for t in range(FRAMES):
        dy, dx = start + drift * t + rng.normal(0, 0.3, 2)
        whole, inside = _render(person, dy, dx)
        if fake:
            swapped, _ = _render(other, dy, dx)
            swapped = _soft(swapped) + 0.8 * (whole.mean((0, 1)) - swapped.mean((0, 1)))
            share = _ellipse(dy, dx, radius, 0.12)
            whole = whole * (1 - share) + swapped * share
        picture = (background * (1 - inside) + whole * inside) * light * (1 + rng.normal(0, 0.01)) + rng.normal(0, 0.008, (SIDE, SIDE, 1))
        frames.append(_compressed((picture.clip(0, 1) * 255).astype(np.uint8), quality))
    return np.stack(frames)


def _grid(dy: float = 0, dx: float = 0) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in units of the half face, 0 in its middle: [side, side] each."""
    place = np.arange(SIDE) + 0.5 - SIDE / 2
    return (place[:, None] - dy) / 27 + 0 * place[None], (place[None] - dx) / 21 + 0 * place[:, None]


def _ellipse(dy: float, dx: float, radius: float, edge: float) -> np.ndarray:
    """Soft share of an ellipse at each pixel: [side, side, 1]."""
    y, x = _grid(dy, dx)
    return (1 / (1 + np.exp((np.hypot(y, x) - radius) / (edge / 4))))[..., None]


def _waves(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Smooth random shading: [side, side, 1]."""
    y, x = _grid()
    total = np.zeros((SIDE, SIDE))
    for _ in range(4):
        fy, fx = rng.uniform(-3, 3, 2)
        total += np.sin(fy * y + fx * x + rng.uniform(0, 2 * np.pi))
    return (strength * total / 2)[..., None]


def _background(rng: np.random.Generator) -> np.ndarray:
    return (rng.uniform(0.1, 0.9, 3) + _waves(rng, 0.15) + rng.normal(0, 0.03, (SIDE, SIDE, 1))).clip(0, 1)


def _face(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One person: skin, shading, grain and where the features are."""
    skin = np.array([0.8, 0.6, 0.48]) * rng.uniform(0.5, 1.1) + rng.normal(0, 0.03, 3)
    return {
        "skin": skin,
        "shade": _waves(rng, 0.08),
        "grain": rng.normal(0, 0.07, (SIDE, SIDE, 1)),
        "eyes": np.array([rng.uniform(-0.35, -0.2), rng.uniform(0.3, 0.45), rng.uniform(0.08, 0.14)]),  # height, distance, size
        "mouth": np.array([rng.uniform(0.4, 0.55), rng.uniform(0.2, 0.38), rng.uniform(0.04, 0.09)]),  # height, width, thickness
        "lips": np.array([0.6, 0.2, 0.2]) + rng.normal(0, 0.06, 3),
    }


def _render(face: dict[str, np.ndarray], dy: float, dx: float) -> tuple[np.ndarray, np.ndarray]:
    """The face as colours [side, side, 3], and the share of each pixel that it covers [side, side, 1]."""
    y, x = _grid(dy, dx)
    move = (round(dy), round(dx))
    colours = face["skin"] + np.roll(face["shade"] + face["grain"], move, (0, 1))
    height, distance, size = face["eyes"]
    for side in (-1, 1):
        eye = np.hypot(y - height, x - side * distance) / size
        colours = np.where((eye < 1)[..., None], 0.95, colours)
        colours = np.where((eye < 0.55)[..., None], 0.1, colours)
    height, width, thickness = face["mouth"]
    mouth = np.hypot((y - height) / thickness, x / width) < 1
    return np.where(mouth[..., None], face["lips"], colours), _ellipse(dy, dx, 1.0, 0.06)


def _soft(picture: np.ndarray) -> np.ndarray:
    """Down to half the resolution and up again."""
    small = picture.reshape(SIDE // 2, 2, SIDE // 2, 2, 3).mean((1, 3))
    bigger = [Image.fromarray(small[..., c].astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for c in range(3)]
    return np.stack([np.asarray(b) for b in bigger], -1)


def _compressed(picture: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def write_folders(data: Data, root: str | Path) -> Path:
    """The data as a person would have them: root/train/real/0001/00.png, ..., one folder of frames a video."""
    root = Path(root)
    for split, dataset in data.splits.items():
        for i in range(len(dataset)):
            s = dataset[i]
            folder = root / split / NAMES[s["label"]] / f"{i:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            for t, frame in enumerate(s["frames"]):
                Image.fromarray(frame).save(folder / f"{t:02d}.png")
    return root
