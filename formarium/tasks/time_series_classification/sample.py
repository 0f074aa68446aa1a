"""Sample data: generated motifs in noise, which need no package, and archives that aeon ships."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from formarium.errors import MissingExtra, UnknownName
from formarium.task import Data
from formarium.tasks.time_series_classification.data import Series, read

SHIPPED = {"basic-motions": "BasicMotions", "japanese-vowels": "JapaneseVowels", "gun-point": "GunPoint"}
LENGTH, MOTIF, CLASSES = 100, 20, 3


def sample(name: str, seed: int = 0) -> Data:
    """ "motifs": noise in two channels; each class hides a pattern of its own, 20 points long, somewhere in one channel, and the same
    decoy in the other. 90 series to train on, 150 held out; a split's `starts` say where each motif begins. From aeon, with their own
    test parts: "basic-motions" (6 channels of a smart watch, 4 activities), "japanese-vowels" (12 channels, 7 to 29 points, 9 speakers),
    "gun-point" (one channel)."""
    if name == "motifs":
        return motifs(seed)
    if name in SHIPPED:
        return _shipped(name)
    raise UnknownName("sample", name, ["motifs", *SHIPPED])


@cache
def _shipped(name: str) -> Data:
    spec = find_spec("aeon")
    folder = Path(spec.origin).parent / "datasets" / "data" / SHIPPED[name] if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise MissingExtra("aeon", "series")
    data = read(folder / f"{SHIPPED[name]}_TRAIN.ts")
    data.source = {"sample": name}
    return data


def patterns() -> np.ndarray:
    """The motif of each class, [classes, MOTIF], and last the decoy that all have; mean 0, deviation 1.5."""
    t = np.linspace(0, 1, MOTIF)
    chirp, saw = np.sin(2 * np.pi * (1 + 2 * t) * t), (3 * t) % 1
    bumps = np.exp(-((t - 0.25) ** 2) / 0.008) - np.exp(-((t - 0.75) ** 2) / 0.008)
    shapes = np.stack([chirp, saw, bumps, np.sin(4 * np.pi * t)])
    shapes = shapes - shapes.mean(1, keepdims=True)
    return 1.5 * shapes / shapes.std(1, keepdims=True)


CHANNEL = (0, 1, 0)  # of each class's motif; the decoy is in the other one


@dataclass
class Planted(Series):
    """Series, and where each one's motif begins."""

    starts: np.ndarray


@cache
def motifs(seed: int = 0, noise: float = 0.4) -> Data:
    """The generated sample; see `sample`. Motif and decoy begin anywhere from point 5 to 75."""
    rng, shapes = np.random.default_rng(seed), patterns()
    splits = {}
    for split, count in [("train", 90), ("val", 150)]:
        label, starts = np.arange(count) % CLASSES, rng.integers(5, LENGTH - MOTIF - 4, (count, 2))
        x = noise * rng.standard_normal((count, 2, LENGTH))
        for i, c in enumerate(label):
            x[i, CHANNEL[c], starts[i, 0] :][:MOTIF] += shapes[c]
            x[i, 1 - CHANNEL[c], starts[i, 1] :][:MOTIF] += shapes[-1]
        splits[split] = Planted(x.astype(np.float32), label, [f"motif {split} {i}" for i in range(count)], starts[:, 0])
    args = {"num_classes": CLASSES, "channels": 2, "length": LENGTH}
    names = ["chirp", "sawtooth", "bumps"]
    return Data("motifs", "time-series-classification", {**splits}, args, names, [], {"sample": "motifs", "seed": seed})
