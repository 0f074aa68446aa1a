"""Average precision of boxes seen from above, predictions as rows and files, and the trivial rival.

No package that is kept up scores rotated boxes without a compiled extension or a whole benchmark's files, so the average precision is our
own: a prediction, best score first over all sweeps, is right where it overlaps a box of its class that no better one has taken by at
least the class's threshold; precision is made to fall monotonically, and the area under it over recall is the score (all points, as
PASCAL VOC since 2010).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formarium.nn.ops.boxes import iou_3d_pairs, iou_bev
from formarium.task import Data, file_stem

SMALL = 1.5  # metres: classes whose boxes are shorter than this count from an IoU of 0.3 on, others from 0.5
CERTAIN = 0.3  # score from which on a prediction counts in F1


def average_precision(scores: np.ndarray, right: np.ndarray, boxes: int) -> float:
    """Area under the precision-recall curve. scores, right (bool): [predictions]; boxes: how many there were to find."""
    if not boxes:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order])
    precision, recall = hits / np.arange(1, len(order) + 1), hits / boxes
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def iou_3d(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[n, 7], [m, 7] to [n, m]."""
    i, j = torch.meshgrid(torch.arange(len(a)), torch.arange(len(b)), indexing="ij")
    return iou_3d_pairs(a[i.flatten()], b[j.flatten()]).view(len(a), len(b))


def matched(overlaps: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Which box each prediction takes, -1 for none. overlaps: [predictions, boxes]. Best score first, each box once."""
    taken, found = np.zeros(overlaps.shape[1], dtype=bool), np.full(len(scores), -1)
    for i in np.argsort(-scores, kind="stable"):
        free = np.where(taken, -1.0, overlaps[i])
        if len(free) and free.max() >= threshold:
            found[i] = free.argmax()
            taken[found[i]] = True
    return found


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """bev_ap and ap_3d (means over the classes there are), ap of each class (by number), yaw_error (degrees, of what was found), f1 (mean
    over sweeps, of predictions with a score of at least 0.3). Only f1 is a mean over samples and comes with one value each."""
    sweeps = [s for p, b in zip(predictions, batches, strict=True) for s in _sweeps(p, b)]
    classes = sorted({int(c) for s in sweeps for c in s["label"]})
    metrics: dict[str, float] = {}
    errors: list[float] = []
    for name, overlap in (("bev_ap", iou_bev), ("ap_3d", iou_3d)):
        values = {}
        for c in classes:
            values[c] = _class_ap(sweeps, c, overlap, errors if name == "bev_ap" else None)
            if name == "bev_ap":
                metrics[f"bev_ap_class{c}"] = values[c]
        metrics[name] = float(np.mean([*values.values()])) if values else 0.0
    metrics["yaw_error"] = float(np.mean(errors)) if errors else 90.0
    f1 = np.array([_f1(s) for s in sweeps])
    metrics["f1"] = float(f1.mean()) if len(f1) else 0.0
    return metrics, {"f1": f1}


def _sweeps(prediction: Any, batch: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
    out = []
    for i in range(len(batch["label"])):
        real = batch["label"][i] >= 0
        truth = {"boxes": batch["boxes"][i][real][:, :7].float().cpu(), "label": batch["label"][i][real].cpu()}
        said = {"found": prediction.boxes[i][:, :7].float(), "scores": prediction.scores[i].float(), "said": prediction.labels[i]}
        out.append({**truth, **said})
    return out


def _threshold(boxes: torch.Tensor) -> float:
    return 0.3 if len(boxes) and float(boxes[:, 3].median()) < SMALL else 0.5


def _class_ap(sweeps: list[dict[str, torch.Tensor]], c: int, overlap: Callable[..., torch.Tensor], errors: list[float] | None) -> float:
    threshold = _threshold(torch.cat([s["boxes"][s["label"] == c] for s in sweeps]))
    scores, right, boxes = [], [], 0
    for s in sweeps:
        truth, own = s["boxes"][s["label"] == c], s["said"] == c
        found = s["found"][own]
        boxes += len(truth)
        if not len(found):
            continue
        which = matched(overlap(found, truth).numpy(), s["scores"][own].numpy(), threshold)
        scores.append(s["scores"][own].numpy())
        right.append(which >= 0)
        if errors is not None:
            turn = found[which >= 0][:, 6] - truth[which[which >= 0]][:, 6]
            turn = torch.remainder(turn + torch.pi / 2, torch.pi) - torch.pi / 2  # a box is the same from behind
            errors += turn.abs().rad2deg().tolist()
    if not scores:
        return 0.0
    return average_precision(np.concatenate(scores), np.concatenate(right), boxes)


def _f1(s: dict[str, torch.Tensor]) -> float:
    hits = tried = 0
    for c in {*s["label"].tolist(), *s["said"].tolist()}:
        own, truth = (s["said"] == c) & (s["scores"] >= CERTAIN), s["boxes"][s["label"] == c]
        tried += int(own.sum())
        if len(truth):
            hits += int((matched(iou_bev(s["found"][own], truth).numpy(), s["scores"][own].numpy(), _threshold(truth)) >= 0).sum())
    total = tried + len(s["label"])
    return 2 * hits / total if total else 1.0


# out ----------------------------------------------------------------------------------------------------------------


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a sweep: id, and boxes as dicts of label, score, box (metres, radians), best first."""
    out = []
    for i, (boxes, scores, labels) in enumerate(zip(prediction.boxes, prediction.scores, prediction.labels, strict=True)):
        order = scores.argsort(descending=True)
        found = [
            {"label": _name(names, int(labels[k])), "score": round(float(scores[k]), 4), "box": [round(v, 3) for v in boxes[k].tolist()]}
            for k in order
        ]
        out.append({"id": batch["id"][i] if "id" in batch else str(i), "boxes": found})
    return out


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else f"class {label}"


def write(prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """NAME.json with boxes, labels and scores (what `read` takes again), and NAME.txt with "x y z dx dy dz yaw name score" a line."""
    paths = []
    for i, row in enumerate(rows(prediction, batch, names)):
        stem = file_stem(row.get("id", i))
        found = row["boxes"]
        document = {k: [b[f] for b in found] for k, f in (("boxes", "box"), ("labels", "label"), ("scores", "score"))}
        lines = [" ".join([*(f"{v:.3f}" for v in b["box"][:7]), b["label"].replace(" ", "_"), f"{b['score']:.4f}"]) for b in found]
        for suffix, text in ((".json", json.dumps(document)), (".txt", "".join(line + "\n" for line in lines))):
            paths.append(folder / f"{stem}{suffix}")
            paths[-1].write_text(text, encoding="utf-8")
    return paths


# the rival ------------------------------------------------------------------------------------------------------------


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """Clusters of points above the ground: cells of 0.4 m that touch form a cluster, the rectangle of least area around it gives centre and
    yaw, the class whose mean footprint is nearest gives size and label, the number of points the score. Scored on "val"."""
    from formarium.tasks.lidar_detection.data import Prepare, collate
    from formarium.tasks.lidar_detection.model import Boxes

    train, val = data.splits["train"], data.splits["val"]
    seen = [train[i] for i in range(min(len(train), 100))]
    boxes, label = np.concatenate([s["boxes"][:, :7] for s in seen]), np.concatenate([s["label"] for s in seen])
    sizes = {int(c): boxes[label == c].mean(0) for c in np.unique(label)}
    prepare, rng = Prepare(), np.random.default_rng(seed)
    predictions, batches = [], []
    for i in range(len(val)):
        batch = collate([prepare(val[i], rng)])
        found = [_guess(c, sizes) for c in clusters(batch["points"][0].numpy())]
        table = np.array([g for g in found if g is not None], dtype=np.float32).reshape(-1, 9)
        said = [torch.from_numpy(table[:, :7])], [torch.from_numpy(table[:, 7])], [torch.from_numpy(table[:, 8]).long()]
        predictions.append(Boxes(*said))
        batches.append(batch)
    return "clusters of points above the ground", score(predictions, batches)[0]


def clusters(points: np.ndarray, cell: float = 0.4, above: float = 0.3, least: int = 5) -> list[np.ndarray]:
    """Groups of points [k, 3] above the ground (the 20th percentile of z), by cells that touch."""
    from scipy.ndimage import label

    ground = np.percentile(points[:, 2], 20)
    points = points[points[:, 2] > ground + above, :3]
    if not len(points):
        return []
    at = np.floor((points[:, :2] - points[:, :2].min(0)) / cell).astype(int)
    grid = np.zeros(at.max(0) + 1, dtype=bool)
    grid[at[:, 0], at[:, 1]] = True
    group = label(grid, structure=np.ones((3, 3)))[0][at[:, 0], at[:, 1]]
    return [points[group == g] for g in np.unique(group) if (group == g).sum() >= least]


def _guess(cluster: np.ndarray, sizes: Mapping[int, np.ndarray]) -> list[float] | None:
    angles = np.linspace(0, np.pi / 2, 30, endpoint=False)
    axes = np.stack([np.stack([np.cos(angles), np.sin(angles)], -1), np.stack([-np.sin(angles), np.cos(angles)], -1)], 1)  # a 2 2
    along = np.einsum("aij,nj->ani", axes, cluster[:, :2])
    low, high = along.min(1), along.max(1)
    best = int(np.prod(high - low + 0.05, axis=1).argmin())
    extent, yaw = high[best] - low[best], angles[best]
    if extent[1] > extent[0]:
        extent, yaw = extent[::-1], yaw + np.pi / 2
    centre = axes[best].T @ ((low[best] + high[best]) / 2)
    label = min(sizes, key=lambda c: abs(sizes[c][3] - extent[0]) + abs(sizes[c][4] - extent[1]))
    if extent[0] > 1.5 * sizes[label][3]:
        return None  # too long for anything known
    return [*centre, float(sizes[label][2]), *sizes[label][3:6], yaw, len(cluster) / (len(cluster) + 50), label]
