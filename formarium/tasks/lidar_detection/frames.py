"""Several sweeps of one sensor as one cloud: earlier ones moved into the latest one's frame, each point with its age.

Beside the folder of points (or in it), where there are any: poses.txt with a line a sweep, in the order of their names, or poses/NAME.txt,
12 or 16 numbers: the rows of the matrix that takes the sensor's coordinates to the world's (KITTI's camera poses aren't that); times.txt
with a line a sweep, in seconds. Without poses the sensor is taken to stand still, without times sweeps to be 0.1 s apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from formarium.errors import BadInput

EGO = 1.0  # metres around the sensor, along x and y, of which earlier sweeps keep nothing: the vehicle itself
STEP = 0.1  # seconds between sweeps


def join_frames(clouds: Sequence[np.ndarray], poses: Sequence[np.ndarray] | None, ages: Sequence[float]) -> np.ndarray:
    """float32 [n, features + 1]: the latest cloud [n0, features] and the earlier ones after it, in its frame; seconds of age last.

    clouds, poses ([4, 4], sensor to world; None where it stands still) and ages: the latest first.
    """
    parts = []
    back = None if poses is None else np.linalg.inv(poses[0].astype(np.float64))
    for i, cloud in enumerate(clouds):
        cloud = np.asarray(cloud, dtype=np.float32)
        if i and poses is not None and back is not None:
            move = back @ poses[i]
            xyz = cloud[:, :3].astype(np.float64) @ move[:3, :3].T + move[:3, 3]
            cloud = np.concatenate([xyz.astype(np.float32), cloud[:, 3:]], 1)
        if i:
            cloud = cloud[(np.abs(cloud[:, :2]) >= EGO).any(1)]
        parts.append(np.concatenate([cloud, np.full((len(cloud), 1), ages[i], dtype=np.float32)], 1))
    return np.concatenate(parts)


@dataclass
class Past:
    """Of one sweep: the files of the ones before it, latest first; the poses and ages of itself and of these."""

    paths: list[str]
    poses: list[np.ndarray] | None
    ages: list[float]


def pasts(paths: Sequence[Path], names: Sequence[str], count: int) -> dict[Path, Past]:
    """What the `count` sweeps before each are. paths, names: of all sweeps of a folder, in the order of their names."""
    folders = (paths[0].parent.parent, paths[0].parent) if paths else ()
    poses = next((found for d in folders if (found := read_poses(d, names)) is not None), None)
    times = next((said for d in folders if (said := read_times(d, names)) is not None), None)
    if times is None:
        place = {i: at for order in sequences(names).values() for at, i in enumerate(order)}
        times = [STEP * place[i] for i in range(len(names))]
    out = {}
    for i, before in enumerate(earlier(names, count)):
        ages = [times[i] - times[j] for j in before]
        own = None if poses is None else [poses[j] for j in (i, *before)]
        out[paths[i]] = Past([str(paths[j]) for j in before], own, [0.0, *ages])
    return out


def sequences(names: Sequence[str]) -> dict[str, list[int]]:
    """Indices of sweeps by sequence, in order. A name is its sequence's and then a number: "a_001" and "a_002" follow one another."""
    found: dict[str, list[tuple[int, int]]] = {}
    for i, name in enumerate(names):
        match = re.match(r"(.*?)(\d*)$", name)
        prefix, number = (match[1], match[2]) if match else (name, "")
        found.setdefault(prefix, []).append((int(number or 0), i))
    return {prefix: [i for _, i in sorted(items)] for prefix, items in found.items()}


def earlier(names: Sequence[str], count: int) -> list[list[int]]:
    """For each sweep the `count` ones before it in its sequence, latest first; its first stands for those before the beginning."""
    out: list[list[int]] = [[] for _ in names]
    for order in sequences(names).values():
        for at, i in enumerate(order):
            out[i] = [order[max(0, at - k)] for k in range(1, count + 1)]
    return out


def read_poses(folder: Path, names: Sequence[str]) -> list[np.ndarray] | None:
    """The pose [4, 4] of each sweep, or None where the folder has none. BadInput for a file that doesn't fit."""
    single, each = folder / "poses.txt", folder / "poses"
    if single.is_file():
        rows = _rows(single)
        if len(rows) != len(names):
            raise BadInput(str(single), expected=f"a line for each of {len(names)} sweeps", got=f"{len(rows)} lines")
        return [_matrix(r, str(single)) for r in rows]
    if each.is_dir():
        missing = [n for n in names if not (each / f"{n}.txt").is_file()]
        if missing:
            raise BadInput(str(each), expected="a file for each sweep", got=f"none for {missing[0]}")
        return [_matrix([v for row in _rows(each / f"{n}.txt") for v in row], str(each / f"{n}.txt")) for n in names]
    return None


def read_times(folder: Path, names: Sequence[str]) -> list[float] | None:
    """Seconds of each sweep, or None where the folder doesn't say. BadInput for a file that doesn't fit."""
    path = folder / "times.txt"
    if not path.is_file():
        return None
    times = [v for row in _rows(path) for v in row]
    if len(times) != len(names):
        raise BadInput(str(path), expected=f"a time for each of {len(names)} sweeps", got=str(len(times)))
    return times


def _rows(path: Path) -> list[list[float]]:
    try:
        rows = [[float(v) for v in line.split()] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as e:
        raise BadInput(str(path), expected="numbers", got=str(e)) from None
    if not all(np.isfinite(v) for row in rows for v in row):
        raise BadInput(str(path), expected="finite numbers", got="NaN or infinity")
    return rows


def _matrix(values: Sequence[float], what: str) -> np.ndarray:
    if len(values) not in (12, 16):
        raise BadInput(what, expected="12 or 16 numbers a pose", got=str(len(values)))
    matrix = np.eye(4)
    matrix[: len(values) // 4] = np.reshape(values, (-1, 4))
    if abs(np.linalg.det(matrix[:3, :3]) - 1) > 0.01:
        raise BadInput(what, expected="a rotation and a shift", got=f"a matrix of determinant {np.linalg.det(matrix[:3, :3]):.3g}")
    return matrix
