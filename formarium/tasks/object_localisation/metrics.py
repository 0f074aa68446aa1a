"""Scores of boxes and classes, predictions as rows and files, and the trivial rival.

A box is right where it overlaps one of the image's true boxes by half (intersection over union, ends exclusive).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from formarium.nn.image_boxes import iou
from formarium.nn.map_boxes import component_boxes, enlarge, min_max
from formarium.task import Data, file_stem

LEVELS = (0.3, 0.5, 0.7)  # of MaxBoxAccV2
THRESHOLDS = np.arange(0, 1, 0.02)


def best_overlap(box: Tensor, truth: Tensor) -> Tensor:
    """The overlap with whichever true box it overlaps most: box float [..., 4], truth [..., most, 4] (NaN: none) -> [...]."""
    overlap, _ = iou(box[..., None, :], truth)
    return overlap.nan_to_num(0.0).amax(-1)


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """gt_known_loc: the share of right boxes. top1_loc, top5_loc: of right boxes whose class is the likeliest, or among the five likeliest.
    accuracy, top5. mean_iou: of boxes. max_box_acc_v2 (Choe et al., CVPR 2020): any part of the map above a threshold may be the box, and
    the threshold is the best there is, at overlaps of 0.3, 0.5 and 0.7; their mean. All but the last come with one value a sample."""
    probabilities = torch.cat([p.probabilities for p in predictions]).float().cpu()
    label = torch.cat([b["label"] for b in batches]).cpu()
    overlap = torch.cat([best_overlap(p.box.float().cpu(), b["boxes"].cpu()) for p, b in zip(predictions, batches, strict=True)])
    rank = (probabilities > probabilities.gather(1, label[:, None])).sum(1)
    right = overlap >= 0.5
    per_sample = {
        "gt_known_loc": right,
        "top1_loc": right & (rank == 0),
        "top5_loc": right & (rank < 5),
        "accuracy": rank == 0,
        "top5": rank < 5,
        "mean_iou": overlap,
    }
    values = {k: v.double().numpy() for k, v in per_sample.items()}
    metrics = {k: float(v.mean()) for k, v in values.items()}
    metrics["max_box_acc_v2"] = max_box_acc_v2(predictions, batches)
    return metrics, values


def max_box_acc_v2(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> float:
    overlaps = []  # samples thresholds
    for p, b in zip(predictions, batches, strict=True):
        for one, (height, width), truth in zip(p.map.float().cpu(), b["size"].tolist(), b["boxes"].cpu(), strict=True):
            overlaps.append(overlaps_by_threshold(one, (height, width), truth))
    table = np.array(overlaps)
    return float(np.mean([(table >= level).mean(0).max() for level in LEVELS]))


def overlaps_by_threshold(one: Tensor, size: tuple[int, int], truth: Tensor) -> list[float]:
    """The best overlap of any part of one map [h, w] above each of THRESHOLDS."""
    values = min_max(enlarge(one[None], size), 0.0 if float(one.max() - one.min()) else 1.0)[0].numpy()
    out = []
    for threshold in THRESHOLDS:
        boxes = component_boxes(values > threshold)
        out.append(float(best_overlap(torch.from_numpy(boxes).float(), truth[None]).max()) if len(boxes) else 0.0)
    return out


def in_pixels(box: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Boxes in the network's image [batch, 4] as boxes in the files' own pixels."""
    visible = batch["visible"].float().cpu()
    corner, extent = visible[:, [0, 1, 0, 1]], (visible[:, 2:] - visible[:, :2]).repeat(1, 2)
    return corner + box.float().cpu() * extent / batch["size"].float().cpu()[:, [1, 0, 1, 0]]


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a sample: id, label (its name), probability, box (left, top, right, bottom in the file's pixels), share of the map."""
    names = names or [str(i) for i in range(prediction.probabilities.shape[1])]
    boxes = in_pixels(prediction.box, batch).tolist()
    ids = batch.get("id") or [str(i) for i in range(len(boxes))]
    out = []
    for i, name in enumerate(ids):
        label = int(prediction.label[i])
        out.append(
            {
                "id": name,
                "label": names[label],
                "probability": round(float(prediction.probabilities[i, label]), 6),
                "box": [round(v, 2) for v in boxes[i]],
                "object_share": round(float(prediction.map[i].float().mean()), 4),
            }
        )
    return out


def write(prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """name.xml, a VOC annotation, and name.png, the map in grey at the file's visible part."""
    from PIL import Image

    paths = []
    for i, row in enumerate(rows(prediction, batch, names)):
        height, width = (int(v) for v in batch["pixels"][i])
        note = ElementTree.Element("annotation")
        ElementTree.SubElement(note, "filename").text = str(row["id"])
        size = ElementTree.SubElement(note, "size")
        for key, value in (("width", width), ("height", height), ("depth", 3)):
            ElementTree.SubElement(size, key).text = str(value)
        thing = ElementTree.SubElement(note, "object")
        ElementTree.SubElement(thing, "name").text = row["label"]
        box = ElementTree.SubElement(thing, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), row["box"], strict=True):
            ElementTree.SubElement(box, key).text = f"{value:.2f}"
        stem = folder / file_stem(row["id"])
        ElementTree.indent(note)
        ElementTree.ElementTree(note).write(f"{stem}.xml", encoding="utf-8")
        x0, y0, x1, y1 = batch["visible"][i].tolist()
        shown = (max(1, round(y1 - y0)), max(1, round(x1 - x0)))
        grey = (enlarge(prediction.map[i : i + 1].cpu(), shown)[0].clamp(0, 1) * 255).round().byte().numpy()
        Image.fromarray(grey).save(f"{stem}.png")
        paths += [Path(f"{stem}.xml"), Path(f"{stem}.png")]
    return paths


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """The centred box, of all widths and heights in steps of a twentieth, that is right most often on "val" itself; the commonest class."""
    dataset = data.splits["val"]
    truths, labels = [], []
    for i in range(len(dataset)):
        s = dataset[i]
        height, width = s["image"].shape[:2]
        truths.append(torch.as_tensor(np.asarray(s["boxes"], dtype=np.float32)) / torch.tensor([width, height] * 2))
        labels.append(s["label"])
    most = max(len(t) for t in truths)
    truth = torch.full((len(truths), most, 4), torch.nan)
    for row, t in zip(truth, truths, strict=True):
        row[: len(t)] = t
    share = torch.arange(1, 21) / 20
    w, h = (v.flatten() for v in torch.meshgrid(share, share, indexing="ij"))
    boxes = torch.stack([0.5 - w / 2, 0.5 - h / 2, 0.5 + w / 2, 0.5 + h / 2], -1)
    right = best_overlap(boxes[:, None], truth[None]) >= 0.5  # boxes samples
    best = int(right.float().mean(1).argmax())
    known = np.asarray(labels)
    common = np.bincount(known).argmax()
    hit = right[best].numpy()
    metrics = {
        "gt_known_loc": float(hit.mean()),
        "top1_loc": float((hit & (known == common)).mean()),
        "accuracy": float((known == common).mean()),
    }
    return "the best box in the middle", metrics
