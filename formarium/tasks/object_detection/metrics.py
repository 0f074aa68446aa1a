"""Scores of detections by COCO's own evaluation, results as COCO writes them, the mean boxes as a rival."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formarium.errors import BadInput
from formarium.nn.image_boxes import iou
from formarium.nn.mask_codes import paste_masks
from formarium.task import Data
from formarium.tasks.object_detection.coco import pycocotools, result_list

NAMES = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L")


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """COCO's twelve box numbers (AP is the mean over IoU 0.5 .. 0.95; sizes that no object has are left out), the APs of masks as mask_AP
    and so on where both sides have masks, and found: the share of a picture's objects that its best boxes, as many as it has objects, hit
    at IoU 0.5 with the right class, with one value a sample."""
    if any("truth" not in b for b in batches):
        raise BadInput("batch", expected="annotated pictures (truth)", got="none", fix="evaluate on annotated data")
    images = [i for b in batches for i in image_ids(b)]
    truths = [a for b in batches for sample in b["truth"] for a in sample]
    with_masks = all(p.masks is not None for p in predictions) and all(a.get("segmentation") for a in truths) and bool(truths)
    results = [r for p, b in zip(predictions, batches, strict=True) for r in results_of(p, b, with_masks)]
    sizes = [tuple(int(v) for v in s) for b in batches for s in b["original_size"]]
    metrics = average_precision(images, truths, results, sizes, "bbox")
    if with_masks:
        metrics |= {f"mask_{k}": v for k, v in average_precision(images, truths, results, sizes, "segm").items() if k[:2] == "AP"}
    found = np.array([v for p, b in zip(predictions, batches, strict=True) for v in _found(p, b) if v is not None])
    if not len(found):
        return metrics, {}
    return {**metrics, "found": float(found.mean())}, {"found": found}


def average_precision(
    images: Sequence[Any],
    truths: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    sizes: Sequence[tuple[int, ...]] = (),
    kind: str = "bbox",
    per_class: bool = False,
) -> dict[str, Any]:
    """COCO's numbers, by name, of annotations and results ("bbox" or "segm"). per_class: AP by category number instead."""
    COCO = pycocotools("coco").COCO
    COCOeval = pycocotools("cocoeval").COCOeval

    ids = {image: n for n, image in enumerate(dict.fromkeys(images), 1)}
    size = dict(zip(ids.values(), sizes, strict=False))
    kinds = sorted({t["category_id"] for t in truths} | {r["category_id"] for r in results})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": n, "height": size.get(n, (0, 0))[0], "width": size.get(n, (0, 0))[1]} for n in ids.values()],
            "categories": [{"id": k, "name": str(k)} for k in kinds],
            "annotations": [{**t, "id": n, "image_id": ids[t["image_id"]]} for n, t in enumerate(truths, 1)],
        }
        coco.createIndex()
        own = [{**r, "image_id": ids[r["image_id"]]} for r in results]
        if kind == "segm":
            own = [{k: v for k, v in r.items() if k != "bbox"} for r in own]
        if not own or not truths:
            return {} if per_class else dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
        found = COCOeval(coco, coco.loadRes(own), kind)
        found.evaluate()
        found.accumulate()
        found.summarize()
    if per_class:
        precision = found.eval["precision"][:, :, :, 0, 2]  # iou recall class
        means = [p[p > -1].mean() if (p > -1).any() else float("nan") for p in np.moveaxis(precision, 2, 0)]
        return {str(k): float(m) for k, m in zip(found.params.catIds, means, strict=True) if m == m}
    return {name: float(value) for name, value in zip(NAMES, found.stats, strict=True) if value >= 0}


def image_ids(batch: Mapping[str, Any]) -> list[Any]:
    """The pictures' COCO numbers, where there are none those that their files are called by, else their names."""
    if "image_id" in batch:
        return [*batch["image_id"]]
    return [int(Path(n).stem) if Path(n).stem.isdigit() else n for n in batch["id"]]


def results_of(prediction: Any, batch: Mapping[str, Any], masks: bool = True, least: float = 0.0) -> list[dict[str, Any]]:
    """Detections as COCO's results files have them: image_id, category_id, bbox (x, y, width, height), score, and with masks their run
    lengths. least: the score below which they are left out."""
    out = []
    for i, image in enumerate(image_ids(batch)):
        kept = prediction.scores[i] > least
        boxes, scores, labels = prediction.boxes[i][kept].float(), prediction.scores[i][kept], prediction.labels[i][kept]
        entries = [
            {"image_id": image, "category_id": c, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": s}
            for (x0, y0, x1, y1), s, c in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
        ]
        if masks and prediction.masks is not None and len(entries):
            mask = pycocotools("mask")

            height, width = (int(v) for v in batch["original_size"][i])
            pasted = paste_masks(prediction.masks[i][kept], boxes, height, width).numpy()
            codes = mask.encode(np.asfortranarray(pasted.transpose(1, 2, 0).astype(np.uint8)))
            for entry, code in zip(entries, codes, strict=True):
                entry["segmentation"] = {"size": [height, width], "counts": code["counts"].decode()}
        out += entries
    return out


def _found(prediction: Any, batch: Mapping[str, Any]) -> list[float | None]:
    out: list[float | None] = []
    for boxes, labels, truth in zip(prediction.boxes, prediction.labels, batch["truth"], strict=True):
        objects = [a for a in truth if not a.get("iscrowd")]
        if not objects:
            out.append(None)
            continue
        true = torch.tensor([a["bbox"] for a in objects])
        true[:, 2:] += true[:, :2]
        kinds = torch.tensor([a["category_id"] for a in objects])
        n = len(objects)
        hit = (iou(boxes[:n, None].float(), true[None])[0] >= 0.5) & (labels[:n, None] == kinds[None])
        out.append(float(hit.any(0).float().mean()))
    return out


def write_results(prediction: Any, batch: Mapping[str, Any], folder: Path) -> Path:
    """detections.json, COCO's results; batch after batch into the same file."""
    path = folder / "detections.json"
    result_list(path, results_of(prediction, batch))
    return path


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str], least: float = 0.3) -> list[dict[str, Any]]:
    """One dict a picture: id, how many objects, and each one's label, score and box (left, top, right, bottom), those above 0.3."""
    out = []
    ids = batch.get("id") or [str(i) for i in range(len(prediction.scores))]
    for name, scores, labels, boxes in zip(ids, prediction.scores, prediction.labels, prediction.boxes, strict=True):
        found = [
            {"label": called(names, c), "score": round(s, 4), "box": [round(v, 2) for v in box]}
            for s, c, box in zip(scores.tolist(), labels.tolist(), boxes.tolist(), strict=True)
            if s > least
        ]
        out.append({"id": name, "count": len(found), "objects": found})
    return out


def called(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) and names[label] else f"class {label}"


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """Of every class the training set's mean box, with the class's share of all objects as its score, in each picture of "val"."""
    from formarium.tasks.object_detection.model import Detections

    train, val = data.splits["train"], data.splits["val"]
    boxes: dict[int, list[np.ndarray]] = {}
    for i in range(len(train)):
        s = train[i]
        height, width = s["image"].shape[:2]
        for box, label in zip(s["boxes"] / np.array([width, height] * 2), s["labels"].tolist(), strict=True):
            boxes.setdefault(label, []).append(box)
    labels = sorted(boxes, key=lambda k: -len(boxes[k]))
    total = sum(len(b) for b in boxes.values())
    mean = torch.tensor(np.stack([np.mean(boxes[k], 0) for k in labels]), dtype=torch.float32)
    share = torch.tensor([len(boxes[k]) / total for k in labels])
    samples = [val[i] for i in range(len(val))]
    sizes = torch.tensor([s["image"].shape[:2] for s in samples])
    scale = sizes.flip(1).repeat(1, 2)[:, None].float()
    n = len(samples)
    said = Detections(share.expand(n, -1), torch.tensor(labels).expand(n, -1), mean * scale)
    batch = {"id": [s["id"] for s in samples], "truth": [s["truth"] for s in samples], "original_size": sizes}
    if all("image_id" in s for s in samples):
        batch["image_id"] = [s["image_id"] for s in samples]
    return "each class's mean box", score([said], [batch])[0]
