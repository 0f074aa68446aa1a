"""Generated pairs: two overlapping, noisy views of a bumpy patch of ground whose height and normals are known everywhere."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data, Sample

SIDE = 1.8  # metres
POINTS = 600
NOISE = 0.003  # metres


class Bumps:
    """Pairs by index, each from the seed and its index: see `pair`."""

    def __init__(self, seed: int, first: int, count: int):
        self.seed, self.first, self.count = seed, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {**pair(self.seed, self.first + index), "id": f"pair {self.first + index}"}


def sample(name: str, seed: int = 0) -> Data:
    """ "bumps": 160 pairs to train on, 40 held out."""
    if name != "bumps":
        raise UnknownName("sample of point-cloud-registration", name, ("bumps",))
    splits = {"train": Bumps(seed, 0, 160), "val": Bumps(seed, 160, 40)}
    return Data("bumps", "point-cloud-registration", splits, {}, (), [], {"sample": "bumps"})


@lru_cache(maxsize=512)
def _pair(seed: int, index: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng((seed, index))
    hills = rng.uniform(-SIDE / 2, SIDE / 2, (24, 2)), rng.uniform(0.1, 0.2, 24), rng.uniform(-0.25, 0.25, 24)
    heading = rng.uniform(0, 2 * np.pi)
    along = np.array([np.cos(heading), np.sin(heading)]) * rng.uniform(0.05, 0.13) * SIDE
    clouds, normals = zip(*(_view(centre, hills, rng) for centre in (-along, along)), strict=True)
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = rotation(rng), rng.uniform(-1, 1, 3)
    # the source stands in a frame of its own: the motion brings it back
    back = np.linalg.inv(motion)
    source = clouds[0] @ back[:3, :3].T + back[:3, 3]
    return tuple(a.astype(np.float32) for a in (source, normals[0] @ back[:3, :3].T, clouds[1], normals[1], motion))


def pair(seed: int, index: int) -> dict[str, Any]:
    """source, source_normals, target, target_normals: float32 [n, 3]; transform float32 [4, 4], source onto target. Arrays of the
    caller's own."""
    keys = ("source", "source_normals", "target", "target_normals", "transform")
    return {k: v.copy() for k, v in zip(keys, _pair(seed, index), strict=True)}


def _view(centre: np.ndarray, hills: tuple[np.ndarray, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points and upward normals [n, 3] of the ground within a disc around `centre`, in random order; each view has points of its own."""
    at, width, height = hills
    count = POINTS - rng.integers(0, 60)
    radius, turn = 0.36 * SIDE * np.sqrt(rng.random(count)), rng.uniform(0, 2 * np.pi, count)
    xy = centre + radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)
    offset = xy[:, None] - at
    bump = height * np.exp(-(offset**2).sum(2) / (2 * width**2))
    slope = -(bump / width**2)[..., None] * offset  # derivatives of each hill
    normal = np.concatenate([-slope.sum(1), np.ones((count, 1))], 1)
    points = np.concatenate([xy, bump.sum(1, keepdims=True)], 1) + NOISE * rng.standard_normal((count, 3))
    return points, normal / np.linalg.norm(normal, axis=1, keepdims=True)


def rotation(rng: np.random.Generator) -> np.ndarray:
    """Drawn evenly from SO(3): [3, 3]."""
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.linalg.det(q)
