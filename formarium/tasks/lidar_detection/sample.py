"""Generated sweeps: a spinning sensor over a flat street along x with cars, pedestrians, and things that are neither.

Traffic keeps to the right: what stands right of the sensor heads along x, what stands left of it the other way, give or take.
Rays are cast against the ground and rotated boxes, so that a thing hides what is behind it and its far side gets no points.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data, Sample
from formarium.tasks.lidar_detection.frames import STEP, join_frames

NAMES = ("car", "pedestrian")
GROUND = -1.8  # metres below the sensor
REACH = 15.0
_BEAMS, _STEPS = 24, 160  # rays up and down, and around


class Street:
    """Scenes by index, each from the seed and its index: points float32 [n, 4] (x, y, z, intensity), boxes float32 [m, 7], label int64
    [m]. With more frames than 1, points float32 [n, 5] (their age in seconds last) and boxes [m, 9] (vx, vy last)."""

    def __init__(self, seed: int, first: int, count: int, frames: int = 1):
        self.seed, self.first, self.count, self.frames = seed, first, count, frames

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        points, boxes, label = scene(self.seed, self.first + index, self.frames)
        return {"points": points, "boxes": boxes, "label": label, "id": f"scene {self.first + index}"}


def sample(name: str, seed: int = 0) -> Data:
    """ "street": 160 scenes to train on, 40 held out. "moving-street": the same places with what moves in motion, seen in 4 sweeps."""
    if name not in ("street", "moving-street"):
        raise UnknownName("sample of lidar-detection", name, ("street", "moving-street"))
    frames = 1 if name == "street" else 4
    splits = {"train": Street(seed, 0, 160, frames), "val": Street(seed, 160, 40, frames)}
    args = {"num_classes": len(NAMES), "point_features": 4} | ({"point_features": 5, "frames": frames} if frames > 1 else {})
    return Data(name, "lidar-detection", splits, args, NAMES, [], {"sample": name})


@lru_cache(maxsize=512)
def scene(seed: int, index: int, frames: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(points, boxes, label) of one scene, as it is at the latest of its sweeps. Things with fewer than 5 points in it have no box."""
    rng = np.random.default_rng((seed, index))
    boxes, kinds = _things(rng)
    points, hit = cast(boxes, rng)
    shine = np.concatenate([[0.2], np.where(kinds == 0, 0.6, np.where(kinds == 1, 0.4, rng.uniform(0.2, 0.7, len(kinds))))])
    cloud = _shining(points, hit, shine, rng)
    seen = np.bincount(hit[hit >= 0], minlength=len(boxes)) >= 5
    keep = seen & (kinds < 2)
    if frames > 1:
        speed = np.where(kinds == 0, rng.uniform(4, 10, len(kinds)) * (rng.random(len(kinds)) < 0.7), rng.uniform(0.8, 1.8, len(kinds)))
        motion = (speed * (kinds < 2))[:, None] * np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1)
        clouds = [cloud]
        for k in range(1, frames):
            then = boxes.copy()
            then[:, :2] -= STEP * k * motion
            clouds.append(_shining(*cast(then, rng), shine, rng))
        cloud = join_frames(clouds, None, [STEP * k for k in range(frames)])
        boxes = np.concatenate([boxes, motion], 1)
    return cloud, boxes[keep].astype(np.float32), kinds[keep].astype(np.int64)


def _shining(points: np.ndarray, hit: np.ndarray, shine: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points with the intensity of what they hit: float32 [n, 4]."""
    intensity = (shine[hit + 1] + 0.08 * rng.standard_normal(len(hit))).clip(0, 1)
    return np.concatenate([points, intensity[:, None]], 1).astype(np.float32)


def _things(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [n, 7] that don't touch, and their kinds: 0 car, 1 pedestrian, 2 wall, 3 bush."""
    boxes: list[np.ndarray] = []
    kinds: list[int] = []
    wanted = [0] * rng.integers(3, 7) + [1] * rng.integers(2, 6) + [2] * rng.integers(1, 3) + [3] * rng.integers(2, 5)
    sizes = {0: (4.2, 1.8, 1.55), 1: (0.7, 0.65, 1.75), 2: (8.0, 0.4, 2.4), 3: (1.4, 1.3, 1.1)}
    for kind in wanted:
        for _ in range(20):
            size = np.array(sizes[kind]) * rng.uniform(0.9, 1.1, 3)
            at = rng.uniform(-REACH + 2, REACH - 2, 2) if kind != 2 else rng.uniform(-REACH, REACH, 2)
            reach = np.hypot(*size[:2]) / 2
            clear = all(np.hypot(*(at - b[:2])) > reach + np.hypot(*b[3:5]) / 2 for b in boxes)
            if np.hypot(*at) > reach + 1.5 and clear:
                yaw = (np.pi if at[1] > 0 else 0.0) + 0.12 * rng.standard_normal() if kind < 2 else rng.uniform(-np.pi, np.pi)
                boxes.append(np.array([*at, GROUND + size[2] / 2, *size, (yaw + np.pi) % (2 * np.pi) - np.pi]))
                kinds.append(kind)
                break
    return np.array(boxes), np.array(kinds)


def cast(boxes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points [n, 3] where the sensor's rays first meet the ground or a box [m, 7], and which (-1 the ground), with 2 cm of noise along a
    ray."""
    up = np.deg2rad(np.linspace(-26, 2, _BEAMS))[:, None]
    around = np.linspace(0, 2 * np.pi, _STEPS, endpoint=False)[None] + rng.uniform(0, 2 * np.pi / _STEPS)
    ray = np.stack(np.broadcast_arrays(np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)), -1).reshape(-1, 3)
    ground = np.where(ray[:, 2] < 0, GROUND / np.minimum(ray[:, 2], -1e-9), np.inf)
    # in each box's own frame: origin and rays turned, then the slabs of its three axes
    cos, sin = np.cos(boxes[:, 6]), np.sin(boxes[:, 6])
    turn = np.stack(
        [np.stack([cos, sin, 0 * cos], -1), np.stack([-sin, cos, 0 * cos], -1), np.stack([0 * cos, 0 * cos, 0 * cos + 1], -1)], 1
    )
    origin = np.einsum("mij,mj->mi", turn, -boxes[:, :3])
    local = np.einsum("mij,rj->rmi", turn, ray)
    local = np.where(np.abs(local) < 1e-9, 1e-9, local)
    a, b = (-boxes[:, 3:6] / 2 - origin) / local, (boxes[:, 3:6] / 2 - origin) / local
    near, far = np.minimum(a, b).max(-1), np.maximum(a, b).min(-1)
    near = np.where((near <= far) & (near > 0), near, np.inf)  # rays boxes
    which = near.argmin(1)
    best = near[np.arange(len(ray)), which]
    hit = np.where(best < ground, which, -1)
    distance = np.minimum(best, ground)
    ok = np.isfinite(distance) & (distance < 1.4 * REACH) & (rng.random(len(ray)) > 0.03)  # some rays never come back
    distance = distance[ok] + 0.02 * rng.standard_normal(int(ok.sum()))
    return ray[ok] * distance[:, None], hit[ok]
