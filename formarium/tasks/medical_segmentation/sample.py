"""Sample data generated from a seed, with masks known by construction: tumours in four contrasts, organs in one."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from formarium.errors import UnknownName
from formarium.task import Data, Sample
from formarium.tasks.medical_segmentation.data import BRATS_NAMES, BRATS_REGIONS, without_masks

# mean intensity of brain, oedema (2), core (1), enhancing rim (4) in T1, T1 with contrast, T2, FLAIR, as radiologists see them
CONTRAST = {0: (1.0, 1.0, 1.0, 1.0), 2: (0.92, 0.95, 1.3, 1.5), 1: (0.7, 0.75, 1.45, 1.2), 4: (0.9, 1.5, 1.3, 1.25)}
NOISE, BIAS = 0.16, 0.2
SIDES = {"tumours": (64, 40, 40), "tumours_2d": (96, 96), "organs": (64, 40, 40), "tumours_unlabelled": (64, 40, 40)}
COUNTS = {"train": 40, "val": 10}
ORGANS = ("large", "round", "long")


class Volumes:
    """Samples in memory."""

    def __init__(self, samples: list[Sample]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


@cache
def sample(name: str, seed: int = 0) -> Data:
    """ "tumours": 40 + 10 volumes 64x40x40 of four contrasts: an ellipsoid of oedema around a core with an enhancing rim, of any pose, in a
    head with a smooth bias field and noise. "tumours_2d": the same in slices of 96x96. "organs": one contrast, three organs, classes.
    "tumours_unlabelled": the tumours without their masks, for pre-training.
    """
    if name not in SIDES:
        raise UnknownName("sample", name, SIDES)
    if name == "tumours_unlabelled":
        found = without_masks(sample("tumours", seed))
        found.name, found.source = name, {"sample": name, "seed": seed}
        return found
    sides, make = SIDES[name], organs if name == "organs" else tumour
    splits: dict[str, Any] = {}
    for number, (split, count) in enumerate(COUNTS.items()):
        cases = []
        for i in range(count):
            image, label = make(sides, np.random.default_rng((seed, number, i)))
            cases.append({"image": image, "label": label, "affine": np.diag([1.5, 1.5, 1.5, 1.0]), "id": f"{name} {split} {i}"})
        splits[split] = Volumes(cases)
    args: dict[str, Any] = {"in_channels": 4, "out_channels": 3, "regions": BRATS_REGIONS, "spatial_dims": len(sides)}
    names = [*BRATS_NAMES]
    if name == "organs":
        args, names = {"in_channels": 1, "out_channels": 4, "regions": (), "spatial_dims": 3}, [*ORGANS]
    return Data(name, "medical-segmentation", splits, args, names, [], {"sample": name, "seed": seed})


def tumour(sides: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(image float32 [4, *sides], 0 outside the head, label int64 [*sides] of 0, 1, 2, 4)."""
    place = _places(sides)
    radius = min(sides) / 2
    head = _distance(place, [s / 2 for s in sides], [0.46 * s for s in sides], np.eye(len(sides))) < 1
    centre = [s / 2 + rng.uniform(-0.16, 0.16) * s for s in sides]
    turn = np.linalg.qr(rng.standard_normal((len(sides), len(sides))))[0]
    axes = radius * rng.uniform(0.4, 0.65, len(sides))
    wobble = 0.12 * _smooth(sides, 5, rng)
    reach = _distance(place, centre, axes, turn) + wobble  # below 1 inside the whole tumour
    label = np.zeros(sides, dtype=np.int64)
    core, inner = rng.uniform(0.55, 0.72), rng.uniform(0.5, 0.7)
    label[(reach < 1) & head] = 2
    label[(reach < core) & head] = 4
    label[(reach < core * inner) & head] = 1
    means = np.stack([np.array([CONTRAST[v][c] for v in (0, 1, 2, 2, 4)])[label] for c in range(4)])
    image = np.stack([_scanned(m, rng) for m in means]) * head
    return image.astype(np.float32), label


def organs(sides: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(image float32 [1, *sides], label int64 [*sides] of 0 .. 3): a large organ, a round and a long one, of close intensities."""
    place, label = _places(sides), np.zeros(sides, dtype=np.int64)
    shapes = [((0.35, 0.5, 0.5), (0.2, 0.36, 0.3)), ((0.7, 0.3, 0.5), (0.11, 0.17, 0.17)), ((0.72, 0.7, 0.5), (0.22, 0.1, 0.12))]
    for value, (centre, axes) in enumerate(shapes, 1):
        middle = [(c + rng.uniform(-0.05, 0.05)) * s for c, s in zip(centre, sides, strict=True)]
        size = [a * s * rng.uniform(0.85, 1.15) for a, s in zip(axes, sides, strict=True)]
        label[_distance(place, middle, size, np.eye(3)) < 1] = value
    return _scanned(np.array([1.0, 1.4, 1.6, 1.25])[label], rng)[None].astype(np.float32), label


def _scanned(mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Under a smooth multiplicative bias field, with noise, above 0."""
    field = 1 + BIAS * _smooth(mean.shape, 12, rng)
    return np.maximum(mean * field + NOISE * rng.standard_normal(mean.shape), 0.01) * rng.uniform(80, 120)


def _smooth(sides: tuple[int, ...], sigma: float, rng: np.random.Generator) -> np.ndarray:
    """A random smooth field of mean 0 and deviation 1."""
    field = gaussian_filter(rng.standard_normal(sides), sigma, mode="wrap", truncate=2.0)
    return (field - field.mean()) / (field.std() + 1e-12)


def _places(sides: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.meshgrid(*(np.arange(s) for s in sides), indexing="ij")).astype(np.float64)


def _distance(place: np.ndarray, centre: Any, axes: Any, turn: np.ndarray) -> np.ndarray:
    """Of each voxel from an ellipsoid's centre, 1 on its surface."""
    ones = (1,) * (place.ndim - 1)
    offset = np.tensordot(turn, place - np.reshape(centre, (-1, *ones)), 1)
    return np.sqrt(((offset / np.reshape(axes, (-1, *ones))) ** 2).sum(0))
