"""Scores of poses: OKS average precision by COCO's own evaluation, PCK; results as COCO writes them; the mean pose as a rival."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formarium.errors import BadInput
from formarium.task import Data
from formarium.tasks.human_pose.joints import JOINTS, SIGMAS
from formarium.tasks.object_detection.coco import pycocotools, result_list

AP_NAMES = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR", "AR50", "AR75", "AR_M", "AR_L")


def oks(predicted: np.ndarray, true: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Object keypoint similarity, 0 to 1. predicted: [people, 17, 2], true: [people, 17, 3] with visibility, area: [people] in pixels^2."""
    spread = (2 * np.array(SIGMAS)) ** 2
    squared = ((predicted - true[..., :2]) ** 2).sum(-1)
    similar = np.exp(-squared / spread / (area[:, None] + np.spacing(1)) / 2)
    seen = true[..., 2] > 0
    return (similar * seen).sum(1) / np.maximum(seen.sum(1), 1)


def oks_nms(poses: np.ndarray, scores: np.ndarray, areas: np.ndarray, threshold: float = 0.9) -> list[int]:
    """The people of one image that are kept, best first: one whose pose is nearer than the threshold to a better one goes."""
    order, kept = [*np.argsort(-scores, kind="stable")], []
    full = np.concatenate([poses, np.ones((*poses.shape[:2], 1))], -1)
    while order:
        best = order.pop(0)
        kept.append(int(best))
        near = [oks(poses[i][None], full[best][None], (areas[[i]] + areas[[best]]) / 2)[0] for i in order]
        order = [i for i, value in zip(order, near, strict=True) if value <= threshold]
    return kept


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """AP and AR by OKS (means over 0.5 .. 0.95, at 0.5 and 0.75, of medium and large people; left out where there are none), oks (the mean
    similarity) and pck (the share of joints within a tenth of the box's longer side), with one value a sample of the last two."""
    truths: dict[Any, dict[str, Any]] = {}
    for batch in batches:
        if "truth" not in batch:
            raise BadInput("batch", expected="annotated people (truth)", got="none", fix="evaluate on annotated data")
        for sample in batch["truth"]:
            truths |= {t["id"]: t for t in sample}
    results = [r for p, b in zip(predictions, batches, strict=True) for r in results_of(p, b)]
    metrics = average_precision([*truths.values()], suppress(results))
    own_oks, own_pck = [], []
    for prediction, batch in zip(predictions, batches, strict=True):
        if "keypoints" not in batch:
            continue
        for pose, sample, box in zip(prediction.keypoints.float().numpy(), batch["truth"], batch["box"].numpy(), strict=True):
            true = np.array(sample[0]["keypoints"]).reshape(-1, 3)
            seen = true[:, 2] > 0
            if not seen.any():
                continue
            own_oks.append(float(oks(pose[None], true[None], np.array([sample[0]["area"]]))[0]))
            distance = np.linalg.norm(pose - true[:, :2], axis=1)[seen]
            own_pck.append(float((distance <= 0.1 * max(box[2], box[3])).mean()))
    per_sample = {"oks": np.array(own_oks), "pck": np.array(own_pck)} if own_oks else {}
    return {**metrics, **{k: float(v.mean()) for k, v in per_sample.items()}}, per_sample


def average_precision(truths: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """COCO's ten keypoint numbers, by name, of annotations and results; 0 for all where nothing was found."""
    COCO = pycocotools("coco").COCO
    COCOeval = pycocotools("cocoeval").COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        ids = {image: n for n, image in enumerate(dict.fromkeys(t["image_id"] for t in truths), 1)}
        coco.dataset = {
            "images": [{"id": n} for n in ids.values()],
            "categories": [{"id": 1, "name": "person"}],
            "annotations": [{**t, "id": n, "image_id": ids[t["image_id"]], "category_id": 1} for n, t in enumerate(truths, 1)],
        }
        coco.createIndex()
        own = [{**r, "image_id": ids[r["image_id"]], "category_id": 1} for r in results if r["image_id"] in ids]
        if not own:
            return dict.fromkeys(AP_NAMES[:3] + AP_NAMES[5:8], 0.0)
        found = COCOeval(coco, coco.loadRes(own), "keypoints")
        found.evaluate()
        found.accumulate()
        found.summarize()
    return {name: float(value) for name, value in zip(AP_NAMES, found.stats, strict=True) if value >= 0}


def results_of(prediction: Any, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """People as COCO's results files have them, with `id` and `area` (of what was cut out) beside."""
    out = []
    names = batch["id"]
    for i, (pose, joints, value) in enumerate(zip(prediction.keypoints.float(), prediction.scores.float(), prediction.score, strict=True)):
        truth = batch["truth"][i] if "truth" in batch else []
        image = truth[0]["image_id"] if truth else _image_id(names[i])
        keypoints = torch.cat([pose, joints[:, None]], 1).flatten().tolist()
        area = float(batch["extent"][i].prod()) if "extent" in batch else float(batch["box"][i][2:].prod())
        entry = {"image_id": image, "category_id": 1, "keypoints": [round(v, 4) for v in keypoints], "score": float(value)}
        out.append({**entry, "area": area, "id": names[i]})
    return out


def suppress(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results without people found twice (OKS above 0.9 to a better one of the same image), as COCO's results files have them."""
    images: dict[Any, list[dict[str, Any]]] = {}
    for r in results:
        images.setdefault(r["image_id"], []).append(r)
    out = []
    for found in images.values():
        poses = np.array([r["keypoints"] for r in found]).reshape(len(found), -1, 3)[..., :2]
        kept = [*range(len(found))]
        if poses.shape[1] == 17:
            kept = oks_nms(poses, np.array([r["score"] for r in found]), np.array([r["area"] for r in found]))
        out += [{k: v for k, v in found[i].items() if k not in ("area", "id")} for i in kept]
    return out


def write_results(prediction: Any, batch: Mapping[str, Any], folder: Path) -> Path:
    """keypoints.json: image_id, category_id, keypoints (x, y, confidence), score; batch after batch into the same file."""
    path = folder / "keypoints.json"
    result_list(path, suppress(results_of(prediction, batch)))
    return path


def _image_id(name: str) -> Any:
    """COCO's number of an image whose file is called by it, else its name."""
    stem = Path(name.split("#")[0]).stem
    return int(stem) if stem.isdigit() else name.split("#")[0]


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a person: id, score, and each joint's x, y (pixels of the whole picture) and confidence."""
    count = prediction.keypoints.shape[1]
    names = names if len(names) == count else [JOINTS[i] if count == 17 else f"joint {i}" for i in range(count)]
    out = []
    ids = batch.get("id") or [str(i) for i in range(len(prediction.keypoints))]
    for name, pose, joints, value in zip(
        ids, prediction.keypoints.tolist(), prediction.scores.tolist(), prediction.score.tolist(), strict=True
    ):
        places = {n: [round(x, 2), round(y, 2), round(s, 4)] for n, (x, y), s in zip(names, pose, joints, strict=True)}
        out.append({"id": name, "score": round(value, 4), "keypoints": places})
    return out


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """The training people's mean pose, put into each box of "val"."""
    from formarium.tasks.human_pose.model import Poses

    total, count = np.zeros((17, 2)), np.zeros((17, 1))
    for i in range(len(data.splits["train"])):
        entry = data.splits["train"][i]
        if "keypoints" not in entry:
            continue
        joints, box = entry["keypoints"], entry["box"]
        seen = joints[:, 2:] > 0
        total += (joints[:, :2] - box[:2]) / box[2:] * seen
        count += seen
    mean = total / np.maximum(count, 1)
    val = [data.splits["val"][i] for i in range(len(data.splits["val"]))]
    boxes = np.stack([s["box"] for s in val])
    poses = torch.from_numpy(mean[None] * boxes[:, None, 2:] + boxes[:, None, :2]).float()
    said = Poses(poses, torch.ones(poses.shape[:2]), torch.ones(len(poses)))
    batch: dict[str, Any] = {"id": [s["id"] for s in val], "box": torch.from_numpy(boxes), "truth": [s["truth"] for s in val]}
    if all("keypoints" in s for s in val):
        batch["keypoints"] = torch.from_numpy(np.stack([s["keypoints"][:, :2] for s in val]))
    return "the mean pose in each box", score([said], [batch])[0]
