"""Reading pairs of clouds and the motions between them.

folder/NAME/source.ply, target.ply, transform.txt       a folder a pair (any format of clouds; src and tgt, gt and pose are understood)
folder/NAME_source.ply, NAME_target.ply, NAME.txt       side by side
folder/pairs.json                                       [{"source": path, "target": path, "transform": 4x4}, ...], paths from the folder
folder/train/..., folder/val/...                        any of these, as given; else a fifth is held out

Clouds: .npy, .npz, .ply, .pcd, .xyz and .txt. A motion is 4x4 numbers in a text, .npy or JSON file (as a list, or under "transform"), and
brings source onto target. Normals come from the file (nx, ny, nz, or columns 4 to 6); where there are none they are estimated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formarium.errors import BadInput
from formarium.task import Data, Sample
from formarium.tasks.lidar_detection.clouds import FORMATS, Cloud, from_array, read_cloud

CLOUDS = tuple(f for f in FORMATS if f != ".bin")
NEIGHBOURS = 20  # points that a normal is estimated from
_SIDES = {"source": ("source", "src"), "target": ("target", "tgt", "ref")}
_MOTIONS = ("transform", "gt", "pose", "transformation")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}


@dataclass(frozen=True)
class Pair:
    """Files of one pair; motion float32 [4, 4], or None where it isn't known."""

    name: str
    source: Path
    target: Path
    motion: np.ndarray | None = None


@dataclass
class Pairs:
    """Pairs of files by index, read when asked for."""

    pairs: list[Pair]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        p = self.pairs[index]
        sample: Sample = {"id": p.name}
        for side, path in (("source", p.source), ("target", p.target)):
            sample[side], sample[f"{side}_normals"] = cloud_and_normals(read_cloud(path), str(path))
        if p.motion is not None:
            sample["transform"] = p.motion
        return sample


def cloud_and_normals(cloud: Cloud, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Points and unit normals float32 [n, 3]. BadInput where there are too few points to estimate normals from, or a normal is zero."""
    points = np.ascontiguousarray(cloud.values[:, :3])
    normals = cloud.take(("nx", "ny", "nz"))
    if normals is None:
        return points, estimate_normals(points, what)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    if (length < 1e-6).any():
        raise BadInput(what, expected="normals that aren't zero", got=f"{int((length < 1e-6).sum())} zero ones of {len(length)}")
    return points, (normals / length).astype(np.float32)


def estimate_normals(points: np.ndarray, what: str = "points", k: int = NEIGHBOURS) -> np.ndarray:
    """Unit normals [n, 3] of the planes through each point's k nearest neighbours, turned towards the origin. BadInput for fewer than k
    points."""
    from scipy.spatial import cKDTree

    if len(points) < k:
        raise BadInput(what, expected=f"at least {k} points, to estimate normals from", got=str(len(points)))
    near = points[cKDTree(points).query(points, k)[1]]
    spread = near - near.mean(1, keepdims=True)
    normals = np.linalg.eigh(np.einsum("nki,nkj->nij", spread, spread))[1][:, :, 0]
    away = (normals * points).sum(1) > 0
    return np.where(away[:, None], -normals, normals).astype(np.float32)


def read(path: str | Path, *, holdout: float = 0.2, seed: int = 0) -> Data:
    """The pairs of a folder. Raises BadInput: no such folder, no pairs, a pair without its motion, a motion that can't be, one pair
    only."""
    root = Path(path)
    if not root.is_dir():
        raise BadInput(str(path), expected="a folder of pairs", got="a file" if root.exists() else "no such path")
    given = {_SPLITS[d.name.lower()]: find_pairs(d) for d in sorted(root.iterdir()) if d.is_dir() and d.name.lower() in _SPLITS}
    given = {k: v for k, v in given.items() if v}
    if "train" not in given or len(given) < 2:
        given = {"all": given.get("train") or find_pairs(root)}
    if not any(given.values()):
        clouds = sum(1 for p in root.rglob("*") if p.suffix.lower() in CLOUDS)
        raise BadInput(
            str(path), expected="NAME/source.ply, target.ply and transform.txt, or pairs.json", got=f"{clouds} files of points, no pair"
        )
    for pair in (p for pairs in given.values() for p in pairs):
        if pair.motion is None:
            raise BadInput(pair.name, expected="a motion (transform.txt, .npy or .json, 4x4 numbers)", got="none", fix="or use predict")
    if "all" in given:
        pairs = given.pop("all")
        held = max(1, round(holdout * len(pairs)))
        if held >= len(pairs):
            raise BadInput(str(path), expected="at least two pairs", got=str(len(pairs)))
        order = np.random.default_rng(seed).permutation(len(pairs))
        given = {"train": [pairs[i] for i in sorted(order[held:])], "val": [pairs[i] for i in sorted(order[:held])]}
    given.setdefault("val", given.get("test", []))
    splits = {k: Pairs(v) for k, v in given.items()}
    return Data(root.name, "point-cloud-registration", splits, {}, (), [], {"path": str(root)})


def find_pairs(root: Path) -> list[Pair]:
    """The pairs in a folder, sorted by name."""
    if (root / "pairs.json").is_file():
        return _listed(root / "pairs.json")
    found = []
    for folder in sorted(d for d in root.iterdir() if d.is_dir()):
        files = {side: _first(folder, names, CLOUDS) for side, names in _SIDES.items()}
        if files["source"] and files["target"]:
            motion = _first(folder, _MOTIONS, (".txt", ".npy", ".json"))
            found.append(Pair(folder.name, files["source"], files["target"], read_motion(motion) if motion else None))
    for source in sorted(p for p in root.iterdir() if p.suffix.lower() in CLOUDS):
        side = next((s for s in _SIDES["source"] if source.stem.endswith(f"_{s}")), None)
        if side is None:
            continue
        name = source.stem.removesuffix(f"_{side}")
        target = _first(root, [f"{name}_{t}" for t in _SIDES["target"]], CLOUDS)
        motion = _first(root, [name, *(f"{name}_{m}" for m in _MOTIONS)], (".txt", ".npy", ".json"))
        if target:
            found.append(Pair(name, source, target, read_motion(motion) if motion else None))
    return found


def _first(folder: Path, names: Sequence[str], endings: Sequence[str]) -> Path | None:
    return next((folder / f"{n}{e}" for n in names for e in endings if (folder / f"{n}{e}").is_file()), None)


def _listed(path: Path) -> list[Pair]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [
            Pair(
                str(e.get("id", f"pair {i}")),
                path.parent / e["source"],
                path.parent / e["target"],
                check_motion(e["transform"], f"{path}, pair {i}") if "transform" in e else None,
            )
            for i, e in enumerate(entries)
        ]
    except BadInput:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        expected = '[{"source": path, "target": path, "transform": 4x4}, ...]'
        raise BadInput(str(path), expected=expected, got=f"{type(e).__name__}: {e}") from None


def read_motion(path: Path) -> np.ndarray:
    """The motion in a .txt, .npy or .json file, float32 [4, 4]."""
    try:
        if path.suffix == ".json":
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            found = found.get("transform") if isinstance(found, Mapping) else found
        else:
            found = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path)
        return check_motion(found, str(path))
    except BadInput:
        raise
    except (ValueError, TypeError, OSError) as e:
        raise BadInput(str(path), expected="4x4 numbers", got=f"{type(e).__name__}: {e}") from None


def check_motion(value: Any, what: str) -> np.ndarray:
    """A rigid motion as float32 [4, 4] (16 or 12 numbers will do). BadInput for anything else."""
    value = np.asarray(value, dtype=np.float64)
    if value.size == 12:
        value = np.concatenate([value.reshape(3, 4), [[0, 0, 0, 1]]])
    if value.size != 16:
        raise BadInput(what, expected="4x4 numbers", got=f"an array {[*value.shape]}")
    value = value.reshape(4, 4)
    turn = value[:3, :3]
    if not np.isfinite(value).all() or np.abs(turn @ turn.T - np.eye(3)).max() > 1e-2 or np.linalg.det(turn) < 0:
        raise BadInput(what, expected="a rigid motion (a rotation and a translation)", got="a matrix that scales, mirrors or isn't finite")
    return value.astype(np.float32)


def inputs(paths: Sequence[str | Path]) -> Pairs:
    """Pairs of unknown motion: folders of pairs, or files, taken two by two (source, target)."""
    pairs, files = [], []
    for path in map(Path, paths):
        if path.is_dir():
            alone = {side: _first(path, names, CLOUDS) for side, names in _SIDES.items()}
            both = alone["source"] and alone["target"]
            pairs += [Pair(path.name, alone["source"], alone["target"])] if both else find_pairs(path)  # type: ignore[arg-type]
        else:
            files.append(path)
    if len(files) % 2:
        raise BadInput(", ".join(map(str, files)), expected="clouds two by two: source, target, ...", got=f"{len(files)} files")
    pairs += [Pair(f"{a.stem} to {b.stem}", a, b) for a, b in zip(files[::2], files[1::2], strict=True)]
    if not pairs:
        raise BadInput(", ".join(map(str, paths)), expected="pairs of clouds, or folders of them", got="none")
    return Pairs([Pair(p.name, p.source, p.target) for p in pairs])


def from_memory(value: Any, index: int) -> Sample:
    """A sample of (source, target), arrays [n, 3] or [n, 6] with normals, or of a dict with source and target."""
    if isinstance(value, Mapping):
        sample = dict(value)
    elif isinstance(value, (tuple, list)) and len(value) == 2:
        sample = {"source": value[0], "target": value[1]}
    else:
        raise BadInput(f"input {index}", expected="(source, target), or a dict with both", got=type(value).__name__)
    for side in ("source", "target"):
        what = f"input {index}'s {side}"
        if side not in sample:
            raise BadInput(what, expected="points [n, 3]", got="none")
        points = sample[side]
        points = np.asarray(points.detach().cpu() if torch.is_tensor(points) else points)
        if f"{side}_normals" in sample:
            points = np.concatenate([points[:, :3], np.asarray(sample[f"{side}_normals"])], 1)
        cloud = from_array(points, what)
        named = Cloud(cloud.values, ("x", "y", "z", "nx", "ny", "nz")) if cloud.values.shape[1] == 6 else cloud
        sample[side], sample[f"{side}_normals"] = cloud_and_normals(named, what)
    return {"id": f"input {index}", **sample}


# to batches -----------------------------------------------------------------------------------------------------------


@dataclass
class Prepare:
    """Raw sample to tensors: one point a voxel, at most so many points; with a recipe, noise (deviation, m) and rotation (1: each cloud
    turned at random, as a network that isn't invariant needs it)."""

    preprocessing: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        recipe, out = self.recipe or {}, {"id": sample.get("id", "")}
        motion = check_motion(sample["transform"], str(out["id"])) if "transform" in sample else None
        for side in ("source", "target"):
            points, normals = np.asarray(sample[side], dtype=np.float32), sample.get(f"{side}_normals")
            what = f"{out['id']}'s {side}"
            if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
                raise BadInput(
                    what, expected="finite points [n, 3]", got=f"{[*points.shape]}{'' if np.isfinite(points).all() else ' with NaN'}"
                )
            normals = estimate_normals(points, what) if normals is None else np.asarray(normals, dtype=np.float32)
            points, normals = thin(points, normals, self.preprocessing.get("voxel", 0.0), self.preprocessing.get("max_points", 0), rng)
            points = points + recipe.get("noise", 0.0) * rng.standard_normal(points.shape).astype(np.float32)
            if recipe.get("rotation", 0):
                from formarium.tasks.point_cloud_registration.sample import rotation

                turn = rotation(rng).astype(np.float32)
                points, normals = points @ turn.T, normals @ turn.T
                if motion is not None:
                    step = np.eye(4, dtype=np.float32)
                    step[:3, :3] = turn if side == "target" else turn.T
                    motion = step @ motion if side == "target" else motion @ step
            out |= {side: torch.from_numpy(points), f"{side}_normals": torch.from_numpy(np.ascontiguousarray(normals))}
        return out if motion is None else {**out, "transform": torch.from_numpy(motion)}


def thin(points: np.ndarray, normals: np.ndarray, voxel: float, most: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the points of each voxel (where it is above 0), and at most `most` (above 0) of them, drawn at random."""
    if voxel > 0:
        cell = np.floor((points - points.min(0)) / voxel).astype(np.int64)
        _, which, count = np.unique(cell, axis=0, return_inverse=True, return_counts=True)
        sums = np.zeros((len(count), 6))
        np.add.at(sums, which.ravel(), np.concatenate([points, normals], 1))
        points = (sums[:, :3] / count[:, None]).astype(np.float32)
        length = np.linalg.norm(sums[:, 3:], axis=1, keepdims=True)
        normals = (sums[:, 3:] / np.maximum(length, 1e-9)).astype(np.float32)
        normals[length[:, 0] < 1e-6] = (0, 0, 1)  # normals that cancel out: any direction is as good
    if 0 < most < len(points):
        keep = rng.permutation(len(points))[:most]
        points, normals = points[keep], normals[keep]
    return points, normals


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Padded to the longest source and the longest target."""
    pad = torch.nn.utils.rnn.pad_sequence
    batch: dict[str, Any] = {"id": [s["id"] for s in samples]}
    for side in ("source", "target"):
        for key in (side, f"{side}_normals"):
            batch[key] = pad([s[key] for s in samples], batch_first=True)
        batch[f"{side}_count"] = torch.tensor([len(s[side]) for s in samples])
    if all("transform" in s for s in samples):
        batch["transform"] = torch.stack([s["transform"] for s in samples])
    return batch
