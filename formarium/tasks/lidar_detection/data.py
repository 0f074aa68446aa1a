"""Reading sweeps and boxes that people have.

folder/points/NAME.bin (or .npy, .pcd, .ply), folder/labels/NAME.txt or .json       split by the seed, a fifth held out
folder/train/..., folder/val/...                                                    the same, as given (training, testing ... too)
KITTI's velodyne/, label_2/ and calib/ are understood; points and labels may also lie side by side in one folder.

Labels: KITTI's text (15 or 16 columns, camera coordinates), "x y z dx dy dz yaw name" a line, or JSON: {"boxes": [[x, y, z, dx, dy, dz,
yaw], ...], "labels": [name, ...]}, or [{"box": [...], "label": name}, ...]. Metres, radians, z at the box's centre; vx, vy may follow.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formarium.errors import BadInput
from formarium.task import Data, Sample
from formarium.tasks.lidar_detection.clouds import FORMATS, from_array, read_cloud
from formarium.tasks.lidar_detection.frames import Past, join_frames, pasts
from formarium.tasks.lidar_detection.paste import Objects, by_class, collect, inside, paste

CLOUDS = tuple(f for f in FORMATS if f not in (".txt", ".xyz", ".npz"))
_POINTS = ("velodyne", "points", "lidar", "samples", "sweeps")
_LABELS = ("label_2", "labels", "label", "annotations", "boxes")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
_IGNORED = {"DontCare", "Misc"}  # KITTI's names for regions and things that don't count


@dataclass
class Sweeps:
    """Files of points by index, with boxes [m, 7 or 9] and names where labels were read. Points are read when asked for, with those of
    earlier sweeps and their age where there is a `past`."""

    root: str
    paths: list[str]
    features: int
    boxes: list[np.ndarray] | None = None
    labels: list[np.ndarray] | None = None
    past: list[Past] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = Path(self.paths[index])
        points = self.cloud(path)
        if self.past is not None:
            past = self.past[index]
            points = join_frames([points, *(self.cloud(Path(p)) for p in past.paths)], past.poses, past.ages)
        name = str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)
        sample: Sample = {"points": points, "id": name}
        if self.boxes is not None and self.labels is not None:
            sample |= {"boxes": self.boxes[index], "label": self.labels[index]}
        return sample

    def cloud(self, path: Path) -> np.ndarray:
        points = read_cloud(path, self.features if path.suffix == ".bin" else None).values
        if self.features and points.shape[1] != self.features:
            raise BadInput(str(path), expected=f"points of {self.features} values", got=f"{points.shape[1]} values a point")
        return points


def read(path: str | Path, *, features: int | None = None, holdout: float = 0.2, seed: int = 0, frames: int = 1) -> Data:
    """The sweeps and boxes of a folder. features: values a point in .bin files (4 where it isn't said, 5 for nuScenes' .pcd.bin).

    frames: how many sweeps a cloud is made of, its own and those before it in its sequence (see frames.py); each point then has its age as
    one value more, and what is held out of one folder is its end, not a draw. Raises BadInput: no such folder, no points, no labels, a box
    that can't be, points of another number of values, nothing to hold out; poses or times that don't fit.
    """
    root = Path(path)
    if frames < 1:
        raise BadInput("frames", expected="1 or more", got=str(frames))
    if not root.is_dir():
        raise BadInput(str(path), expected="a folder of sweeps and labels", got="a file" if root.exists() else "no such path")
    given = {_SPLITS[d.name.lower()]: d for d in sorted(root.iterdir()) if d.is_dir() and d.name.lower() in _SPLITS}
    labelled = {split: d for split, d in given.items() if _pairs(d)[0]}
    notes: list[str] = []
    if "train" in labelled and len(labelled) > 1:
        found = {split: _pairs(d) for split, d in labelled.items()}
    else:
        found = {"all": _pairs(labelled["train"] if labelled else root)}
    if not any(pairs for pairs, _ in found.values()):
        clouds = sum(1 for p in root.rglob("*") if p.suffix.lower() in CLOUDS)
        got = f"{clouds} files of points, none with labels beside it" if clouds else "no file of points"
        raise BadInput(str(path), expected=f"points/NAME{CLOUDS[0]} with labels/NAME.txt or .json", got=got)
    for split, (_, alone) in found.items():
        if alone:
            notes.append(
                f"{len(alone)} sweeps of {split} without labels left out: {', '.join(alone[:4])}{', ...' if len(alone) > 4 else ''}"
            )
    read_ = {split: [(p, *read_labels(label, calib)) for p, label, calib in pairs] for split, (pairs, _) in found.items()}
    names = sorted({n for items in read_.values() for _, _, ns in items for n in ns})
    if not names:
        raise BadInput(str(path), expected="at least one box in all the labels", got="none")
    first = next(p for items in read_.values() for p, _, _ in items)
    count = features or read_cloud(first).values.shape[1]
    if "all" in read_:
        items = read_.pop("all")
        held = max(1, round(holdout * len(items)))
        if held >= len(items):
            raise BadInput(str(path), expected="at least two labelled sweeps", got=str(len(items)))
        order = np.random.default_rng(seed).permutation(len(items)) if frames == 1 else np.arange(len(items))[::-1]
        read_ = {"train": [items[i] for i in sorted(order[held:])], "val": [items[i] for i in sorted(order[:held])]}
    elif "val" not in read_:
        read_["val"] = read_["test"]
    index = {n: i for i, n in enumerate(names)}
    past: dict[Path, Past] = {}
    for folder in {p.parent for items in read_.values() for p, _, _ in items} if frames > 1 else ():
        files = _clouds(folder)
        past |= pasts(files, [_stem(p) for p in files], frames - 1)
    splits = {
        split: Sweeps(
            str(root), [str(p) for p, _, _ in items], count, [b for _, b, _ in items],
            [np.array([index[n] for n in ns], dtype=np.int64) for _, _, ns in items],
            [past[p] for p, _, _ in items] if frames > 1 else None,
        )
        for split, items in read_.items()
    }  # fmt: skip
    args = {"num_classes": len(names), "point_features": count}
    source: dict[str, Any] = {"path": str(root)}
    if frames > 1:
        args |= {"point_features": count + 1, "frames": frames}
        source["options"] = {"features": features, "holdout": holdout, "seed": seed, "frames": frames}
        if all(p.poses is None for p in past.values()):
            notes.append("no poses beside the points: the sensor is taken to stand still")
    return Data(root.name, "lidar-detection", splits, args, names, notes, source)


def _pairs(folder: Path) -> tuple[list[tuple[Path, Path, Path | None]], list[str]]:
    """(points, labels, calibration) of a folder, and the sweeps that have no labels."""
    points_in = next((folder / n for n in _POINTS if (folder / n).is_dir()), folder)
    labels_in = next((folder / n for n in _LABELS if (folder / n).is_dir()), points_in)
    pairs, alone = [], []
    for path in _clouds(points_in):
        stem = _stem(path)
        label = next((labels_in / f"{stem}{e}" for e in (".json", ".txt") if (labels_in / f"{stem}{e}").is_file()), None)
        calib = folder / "calib" / f"{stem}.txt"
        if label is None:
            alone.append(path.name)
        else:
            pairs.append((path, label, calib if calib.is_file() else None))
    return pairs, alone


def _clouds(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in CLOUDS and p.is_file())


def _stem(path: Path) -> str:
    return path.name.removesuffix(".bin").removesuffix(".pcd") if path.name.endswith(".pcd.bin") else path.stem


# labels -------------------------------------------------------------------------------------------------------------


def read_labels(path: Path, calib: Path | None = None) -> tuple[np.ndarray, list[str]]:
    """Boxes float32 [m, 7 or 9] in the sensor's frame, and their names. BadInput for a file that can't be read or a box that can't be."""
    try:
        boxes, names = _json_labels(path) if path.suffix == ".json" else _text_labels(path, calib)
    except (ValueError, KeyError, TypeError, IndexError) as e:
        expected = "KITTI's columns, 'x y z dx dy dz yaw name', or JSON with boxes and labels"
        raise BadInput(str(path), expected=expected, got=f"{type(e).__name__}: {e}") from None
    return check_boxes(boxes, str(path)), names


def check_boxes(boxes: Any, what: str) -> np.ndarray:
    """Boxes as float32 [m, 7 or 9]. BadInput for another shape, values that aren't finite (but an unknown velocity), or sizes of 0 and
    less."""
    boxes = np.asarray(boxes, dtype=np.float32)
    boxes = boxes.reshape(-1, 7) if boxes.size == 0 else boxes
    if boxes.ndim != 2 or boxes.shape[1] not in (7, 9):
        raise BadInput(what, expected="boxes [m, 7 or 9]: x, y, z, dx, dy, dz, yaw (, vx, vy)", got=f"an array {[*boxes.shape]}")
    if not np.isfinite(boxes[:, :7]).all():
        raise BadInput(what, expected="boxes of finite values", got="NaN or infinity")
    flat = (boxes[:, 3:6] <= 0).any(1).nonzero()[0]
    if len(flat):
        size = " x ".join(f"{v:g}" for v in boxes[flat[0], 3:6])
        raise BadInput(
            what, expected="boxes with sizes above zero", got=f"box {flat[0]} of {size} m", fix="leave it out, or mend its sizes"
        )
    return boxes


def _json_labels(path: Path) -> tuple[Any, list[str]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(found, Mapping):
        boxes, names = found["boxes"], found.get("labels", found.get("names"))
    else:
        boxes, names = [b["box"] for b in found], [b["label"] for b in found]
    if names is None or len(boxes) != len(names):
        raise ValueError(f"{len(boxes)} boxes and {len(names or ())} labels")
    return boxes, [str(n) for n in names]


def _text_labels(path: Path, calib: Path | None) -> tuple[Any, list[str]]:
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows:
        return [], []
    if len(rows[0]) in (15, 16):
        return _kitti(rows, calib)
    return [[float(v) for v in r[:-1]] for r in rows], [r[-1] for r in rows]


def _kitti(rows: list[list[str]], calib: Path | None) -> tuple[np.ndarray, list[str]]:
    rows = [r for r in rows if r[0] not in _IGNORED]
    values = np.array([[float(v) for v in r[8:15]] for r in rows]).reshape(-1, 7)
    height, width, length = values[:, 0], values[:, 1], values[:, 2]
    to_sensor = _kitti_frame(calib)
    bottom = np.concatenate([values[:, 3:6], np.ones((len(values), 1))], 1) @ to_sensor.T
    centre = bottom[:, :3] + np.stack([0 * height, 0 * height, height / 2], 1)
    return np.concatenate([centre, np.stack([length, width, height, -values[:, 6] - np.pi / 2], 1)], 1), [r[0] for r in rows]


def _kitti_frame(calib: Path | None) -> np.ndarray:
    """[4, 4] from the rectified camera's frame (x right, y down, z ahead) to the sensor's. Without a file the axes are only renamed."""
    if calib is None:
        return np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=float)
    lines = dict(line.split(":", 1) for line in calib.read_text(encoding="utf-8").splitlines() if ":" in line)
    known = {k.strip(): np.array(v.split(), dtype=float) for k, v in lines.items()}
    rect, to_camera = np.eye(4), np.eye(4)
    rect[:3, :3] = known["R0_rect" if "R0_rect" in known else "R_rect"].reshape(3, 3)
    to_camera[:3] = known["Tr_velo_to_cam" if "Tr_velo_to_cam" in known else "Tr_velo_cam"].reshape(3, 4)
    return np.linalg.inv(rect @ to_camera)


# for predict ----------------------------------------------------------------------------------------------------------


def inputs(paths: Sequence[str | Path]) -> Sweeps:
    """Sweeps without labels, of files, folders or globs. BadInput where there are none."""
    files: list[str] = []
    for path in map(str, paths):
        if Path(path).is_dir():
            files += sorted(str(p) for p in Path(path).rglob("*") if p.suffix.lower() in CLOUDS)
        elif Path(path).is_file():
            files.append(path)
        else:
            files += sorted(glob.glob(path, recursive=True))
    if not files:
        raise BadInput(", ".join(map(str, paths)), expected=f"files of points ({', '.join(CLOUDS)}), or folders of them", got="none")
    return Sweeps(str(Path(files[0]).parent), files, 0)


def from_memory(value: Any, index: int) -> Sample:
    """A sample of an array [points, features], or of a dict with points (and boxes and label)."""
    sample = dict(value) if isinstance(value, Mapping) else {"points": value}
    if "points" not in sample:
        raise BadInput(
            f"input {index}", expected="an array [points, features], or a dict with points", got=f"a dict of {', '.join(sample)}"
        )
    points = sample["points"]
    points = points.detach().cpu().numpy() if torch.is_tensor(points) else points
    sample["points"] = from_array(np.asarray(points), f"input {index}").values
    return {"id": f"input {index}", **sample}


# to batches -----------------------------------------------------------------------------------------------------------


@dataclass
class Prepare:
    """Raw sample to tensors; with a recipe, boxes without points are left out (min_points), objects of other sweeps join, and the world is
    turned, scaled, shifted and flipped (points and boxes alike).

    objects, wanted: what may be pasted, and how many of each class a sweep shall then have. endings: transforms that take this one's place
    from an epoch on, the last one that has begun.
    """

    recipe: Mapping[str, Any] | None = None
    objects: Objects | None = None
    wanted: Sequence[int] = ()
    endings: Sequence[tuple[float, Prepare]] = ()

    def at(self, epoch: int) -> Prepare:
        return next((ending for first, ending in reversed(self.endings) if epoch >= first), self)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        points = np.array(sample["points"], dtype=np.float32)
        out: Sample = {"id": sample.get("id", "")}
        if "boxes" in sample:
            boxes, label = check_boxes(sample["boxes"], str(out["id"])).copy(), np.asarray(sample["label"], dtype=np.int64)
            if self.recipe:
                if least := self.recipe.get("min_points", 0):
                    seen = inside(points, boxes).sum(0) >= least
                    boxes, label = boxes[seen], label[seen]
                if self.objects is not None:
                    points, boxes, label = paste(points, boxes, label, self.objects, self.wanted, rng)
                points, boxes = augment(points, boxes, self.recipe, rng)
            out |= {"boxes": torch.from_numpy(boxes), "label": torch.from_numpy(label)}
        return out | {"points": torch.from_numpy(points)}


def prepare_training(recipe: Mapping[str, Any], data: Data, epochs: float) -> Prepare:
    """The transform of a training of so many epochs.

    paste: how many objects of each class a sweep is filled up to, one number or a table by the classes' names ("other" for the rest);
    paste_points: the least points of such an object, likewise. Nothing is pasted in the last `unpasted_epochs`, and in the last
    `plain_epochs` nothing is augmented at all.
    """
    full = Prepare(recipe)
    if recipe.get("paste"):
        names = data.names or [f"class {i}" for i in range(data.model_args["num_classes"])]
        full.wanted = by_class(recipe["paste"], names, "paste")
        full.objects = collect(data.splits["train"], by_class(recipe.get("paste_points", 5), names, "paste_points"))
    plain, unpasted = recipe.get("plain_epochs", 0), recipe.get("unpasted_epochs", 0)
    bare = Prepare({k: v for k, v in recipe.items() if k == "min_points"})
    full.endings = ((epochs - max(plain, unpasted), Prepare(recipe)), (epochs - plain, bare))
    return full


def augment(points: np.ndarray, boxes: np.ndarray, recipe: Mapping[str, Any], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One draw of: flip (probability, along x and along y), rotation (most, radians about z), scaling (low, high), translation
    (deviation, m)."""
    for axis in (0, 1):
        if rng.random() < recipe.get("flip", 0.0):
            other = 1 - axis
            points[:, other] *= -1
            boxes[:, other] *= -1
            boxes[:, 6] = -boxes[:, 6] if axis == 0 else np.pi - boxes[:, 6]
            if boxes.shape[1] == 9:
                boxes[:, 7 + other] *= -1
    angle = rng.uniform(-1, 1) * recipe.get("rotation", 0.0)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], dtype=np.float32)
    low, high = recipe.get("scaling", (1.0, 1.0))
    scale, shift = rng.uniform(low, high), (rng.standard_normal(3) * recipe.get("translation", 0.0)).astype(np.float32)
    points[:, :2], boxes[:, :2] = points[:, :2] @ turn, boxes[:, :2] @ turn
    boxes[:, 6] += angle
    if boxes.shape[1] == 9:
        boxes[:, 7:] = boxes[:, 7:] @ turn * scale
    points[:, :3] = points[:, :3] * scale + shift
    boxes[:, :6] *= scale
    boxes[:, :3] += shift
    boxes[:, 6] = (boxes[:, 6] + np.pi) % (2 * np.pi) - np.pi
    return points, boxes


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Padded to the longest cloud and the most boxes. BadInput where points have different numbers of values."""
    widths = {s["points"].shape[1] for s in samples}
    if len(widths) > 1:
        raise BadInput("a batch of sweeps", expected="points of one number of values", got=" and ".join(map(str, sorted(widths))))
    pad = torch.nn.utils.rnn.pad_sequence
    batch: dict[str, Any] = {
        "points": pad([s["points"] for s in samples], batch_first=True),
        "count": torch.tensor([len(s["points"]) for s in samples]),
        "id": [s["id"] for s in samples],
    }
    if all("boxes" in s for s in samples):
        width = max(s["boxes"].shape[1] for s in samples)
        boxes = [torch.nn.functional.pad(s["boxes"], (0, width - s["boxes"].shape[1]), value=float("nan")) for s in samples]
        batch["boxes"] = pad(boxes, batch_first=True)
        batch["label"] = pad([s["label"] for s in samples], batch_first=True, padding_value=-1)
    return batch
