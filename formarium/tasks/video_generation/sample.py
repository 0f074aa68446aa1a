"""Sample data: clips of things that move at constant velocity and bounce off the walls, drawn from a seed; what comes next is known."""

from __future__ import annotations

from functools import cache

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.video_generation.data import Clips

SIDE, FRAMES = 16, 8
COUNTS = {"train": 1500, "val": 120}


def sample(name: str, seed: int = 0) -> Data:
    """ "shapes": a disc, square or ring of its own brightness. "digits": an 8x8 handwritten digit (scikit-learn; writers of the held-out
    ones aren't in training). Both 16x16 pixels, 8 frames, one channel, 1500 clips and 120 held out; the task is to predict the last 4
    frames."""
    if name not in ("shapes", "digits"):
        raise UnknownName("sample", name, ("shapes", "digits"))
    return _made(name, seed)


@cache
def _made(name: str, seed: int) -> Data:
    rng = np.random.default_rng((seed, 17))
    splits = {}
    for split, count in COUNTS.items():
        clips = [_shape(rng) if name == "shapes" else _digit(rng, split) for _ in range(count)]
        splits[split] = Clips(clips, [f"{name} {split} {i}" for i in range(count)])
    args = {"num_frames": FRAMES, "channels": 1, "frame_size": SIDE}
    return Data(name, "video-generation", {**splits}, args, (), [], {"sample": name, "seed": seed})


def bounced(start: np.ndarray, velocity: np.ndarray, low: float, high: float, frames: int = FRAMES) -> np.ndarray:
    """Positions [frames, 2] of a point that moves between two walls."""
    span = high - low
    at = (start - low + velocity * np.arange(frames)[:, None]) % (2 * span)
    return low + np.where(at > span, 2 * span - at, at)


def _shape(rng: np.random.Generator) -> np.ndarray:
    """A clip uint8 [frames, side, side, 1] of a shape with soft edges."""
    radius, kind, bright = rng.uniform(2, 3.5), rng.integers(3), rng.uniform(0.6, 1)
    angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.6)
    velocity = speed * np.array([np.sin(angle), np.cos(angle)])
    path = bounced(rng.uniform(radius, SIDE - radius, 2), velocity, radius, SIDE - radius)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    dy, dx = np.abs(y - path[:, 0, None, None]), np.abs(x - path[:, 1, None, None])
    far = np.maximum(dy, dx) if kind == 1 else np.hypot(dy, dx)
    inside = np.clip(radius - far + 0.5, 0, 1)
    if kind == 2:
        inside = inside * np.clip(far - radius * 0.45 + 0.5, 0, 1)
    return (inside * bright * 255).round().astype(np.uint8)[..., None]


@cache
def _digits() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    images = (load_digits().images / 16 * 255).round().astype(np.uint8)
    return {"train": images[:1400], "val": images[1400:]}  # writer by writer


def _digit(rng: np.random.Generator, split: str) -> np.ndarray:
    images = _digits()[split]
    digit, angle, speed = images[rng.integers(len(images))], rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.6)
    path = bounced(rng.uniform(0, SIDE - 8, 2), speed * np.array([np.sin(angle), np.cos(angle)]), 0, SIDE - 8)
    clip = np.zeros((FRAMES, SIDE, SIDE, 1), np.uint8)
    for frame, (y, x) in zip(clip, path.round().astype(int), strict=True):
        frame[y : y + 8, x : x + 8, 0] = digit
    return clip
