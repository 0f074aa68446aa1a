"""Pasted objects (ground-truth sampling, Yan et al., SECOND, 2018): boxes of other training sweeps, with the points in them, join a sweep.

An object keeps the place it was seen at. It is left out where its box, from above, overlaps one that is there or another drawn with it;
the sweep's own points in its box give way to it. What is pasted hides nothing behind it, as in the published training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from formarium.errors import BadInput
from formarium.nn.ops.boxes import iou_bev
from formarium.task import Dataset


@dataclass
class Objects:
    """What may be pasted: of object i, points[start[i] : start[i + 1]] (float32, in its sweep's frame), boxes[i], label[i]."""

    points: np.ndarray
    start: np.ndarray
    boxes: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    def of(self, i: int) -> np.ndarray:
        return self.points[self.start[i] : self.start[i + 1]]


def collect(dataset: Dataset, least: Sequence[int]) -> Objects:
    """All objects of a labelled data set that hold at least least[label] points. Reads every sweep once; the points stay in memory.

    Raises BadInput where no object is left.
    """
    clouds, boxes, label = [], [], []
    for i in range(len(dataset)):
        sample = dataset[i]
        points, own = np.asarray(sample["points"], dtype=np.float32), np.asarray(sample["boxes"], dtype=np.float32)
        for k in range(len(own)):
            c = int(sample["label"][k])
            held = points[inside(points, own[k : k + 1])[:, 0]]
            if len(held) >= max(1, least[c]):
                clouds.append(held)
                boxes.append(own[k])
                label.append(c)
    if not clouds:
        raise BadInput("paste", expected="objects with points in them", got="none in the training data", fix="a smaller paste_points")
    width = max(len(b) for b in boxes)
    table = np.stack([np.pad(b, (0, width - len(b)), constant_values=np.nan) for b in boxes])
    start = np.cumsum([0, *map(len, clouds)])
    return Objects(np.concatenate(clouds), start, table, np.array(label, dtype=np.int64))


def paste(
    points: np.ndarray, boxes: np.ndarray, label: np.ndarray, objects: Objects, wanted: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sweep with objects pasted: points [n, features], boxes [m, 7 or 9], label [m].

    wanted: of each class, how many a sweep shall have, its own included; so many fewer are drawn, and those that collide are left out.
    """
    chosen: list[int] = []
    for c in range(len(wanted)):
        own = np.flatnonzero(objects.label == c)
        most = min(wanted[c] - int((label == c).sum()), len(own))
        if most <= 0:
            continue
        drawn = rng.choice(own, most, replace=False)
        found = objects.boxes[drawn]
        there = np.concatenate([boxes[:, :7], objects.boxes[chosen][:, :7]])
        clash = _overlaps(found, there).any(1)
        among = _overlaps(found, found)
        np.fill_diagonal(among, False)
        chosen += drawn[~clash & ~among.any(1)].tolist()
    if not chosen:
        return points, boxes, label
    new = objects.boxes[chosen]
    if new.shape[1] != boxes.shape[1]:  # velocities are known of one of them only
        width = max(new.shape[1], boxes.shape[1])
        new, boxes = (np.pad(b, ((0, 0), (0, width - b.shape[1])), constant_values=np.nan) for b in (new, boxes))
    rest = points[~inside(points, new).any(1)]
    clouds = [objects.of(i) for i in chosen]
    return np.concatenate([*clouds, rest]), np.concatenate([boxes, new]), np.concatenate([label, objects.label[chosen]])


def inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether each point [n, 3+] lies in each box [m, 7+]: bool [n, m]."""
    out = np.zeros((len(points), len(boxes)), dtype=bool)
    for k, box in enumerate(boxes[:, :7]):
        near = np.flatnonzero(((points[:, :2] - box[:2]) ** 2).sum(1) <= (box[3] ** 2 + box[4] ** 2) / 4 + 1e-4)
        offset = points[near, :3] - box[:3]
        cos, sin = np.cos(box[6]), np.sin(box[6])
        local = np.stack([offset[:, 0] * cos + offset[:, 1] * sin, offset[:, 1] * cos - offset[:, 0] * sin, offset[:, 2]], 1)
        out[near, k] = (np.abs(local) <= box[3:6] / 2).all(1)
    return out


def by_class(value: Any, names: Sequence[str], key: str) -> list[int]:
    """A recipe's number for every class, or table of them by the classes' names ("other" for those that it doesn't name), as one a class.

    BadInput for what isn't a number, a number below 0, or a class with none."""
    table = value if isinstance(value, Mapping) else {"other": value}
    known = {str(k).lower(): v for k, v in table.items()}
    out = []
    for name in names:
        number = known.get(name.lower(), known.get("other"))
        if number is None:
            got = f"numbers for {', '.join(map(str, table))}"
            raise BadInput(f"recipe key {key}", expected=f"a number for {name}, or for other", got=got)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or number < 0 or number != int(number):
            raise BadInput(f"recipe key {key}", expected="whole numbers, at least 0", got=repr(number))
        out.append(int(number))
    return out


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether boxes overlap from above: bool [n, m]."""
    return (iou_bev(torch.from_numpy(a[:, :7]).float(), torch.from_numpy(b[:, :7]).float()) > 0).numpy()
