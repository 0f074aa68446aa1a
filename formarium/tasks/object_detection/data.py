"""Reading COCO instance files and pictures.

A raw sample is one picture: image (uint8 [height, width, 3]), id, and where annotated boxes (float32 [objects, 4]: left, top, right,
bottom, pixels), labels (int64 [objects], category numbers), masks (bool [objects, height, width]) and truth (its COCO annotations, crowds
included).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formarium.errors import BadInput
from formarium.task import Data, Sample
from formarium.tasks.image_classification import data as pictures
from formarium.tasks.object_detection.coco import CocoFile, clip_box, few, find_files, hold_out, pycocotools, read_file

MOST_CLASSES = 2000  # the largest category number that is taken as it is


@dataclass
class Scenes:
    """Pictures by index. Each entry holds the path of its image (or the image itself) and what a raw sample holds beside it."""

    entries: list[dict[str, Any]]
    masks: bool = False

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = dict(self.entries[index])
        if "path" in entry:
            entry["image"] = decode(entry.pop("path"))
        if self.masks and "masks" not in entry:
            entry["masks"] = draw_masks(entry["truth"], entry["image"].shape[:2])
        return entry


def decode(path: str) -> np.ndarray:
    """An image file as uint8 RGB. BadInput where it can't be decoded."""
    try:
        return pictures.decode(path)
    except Exception as e:
        raise BadInput(path, expected="an image that decodes", got=type(e).__name__) from None


def draw_masks(truth: Sequence[Mapping[str, Any]], size: tuple[int, ...]) -> np.ndarray:
    """bool [objects, height, width] of annotations' segmentations (polygons or run lengths), without crowds."""
    mask = pycocotools("mask")

    height, width = size[:2]
    out = []
    for a in truth:
        if a.get("iscrowd"):
            continue
        shape = a["segmentation"]
        if isinstance(shape, list):
            shape = mask.merge(mask.frPyObjects(shape, height, width))
        elif isinstance(shape["counts"], list):
            shape = mask.frPyObjects(shape, height, width)
        out.append(mask.decode(shape).astype(bool))
    return np.stack(out) if out else np.zeros((0, height, width), dtype=bool)


def read(
    path: str | Path,
    *,
    images: str | Path | None = None,
    strict: bool = False,
    holdout: float = 0.2,
    seed: int = 0,
    masks: bool | None = None,
) -> Data:
    """The pictures of COCO instance files: a json file, or a folder with some (see coco.py for the layouts).

    images: the folder of the pictures. strict: fail on what can't be used, rather than leave it out and say so in `notes`. holdout, seed:
    of a single file's split. masks: whether instance masks are drawn; by default where every object has a segmentation.
    Raises BadInput: no such path, no COCO json, no annotations, no usable object, missing images, categories without a number.
    """
    files = find_files(path, "instances")
    notes: list[str] = []
    found = {split: read_file(file, images, strict) for split, file in files.items()}
    categories: dict[int, str] = {}
    for file in found.values():
        notes += file.notes
        categories |= file.categories
    if not categories:
        raise BadInput(str(path), expected="a list of categories with id and name", got="none")
    wrong = [str(k) for k in categories if not isinstance(k, int) or not 0 <= k < MOST_CLASSES]
    if wrong:
        raise BadInput(f"category {few(wrong)}", expected=f"a whole number from 0 to {MOST_CLASSES - 1} as its id", got="another")
    entries = {split: _entries(file, categories, strict, notes) for split, file in found.items()}
    if "all" in entries:
        kept, held = hold_out(range(len(entries["all"])), holdout, seed, path)
        entries = {split: [entries["all"][i] for i in part] for split, part in (("train", kept), ("val", held))}
    drawn = all(a.get("segmentation") for part in entries.values() for e in part for a in e["truth"] if not a.get("iscrowd"))
    if masks and not drawn:
        raise BadInput(str(path), expected="a segmentation for every object", got="objects without one", fix="leave out masks")
    splits = {split: Scenes(part, drawn if masks is None else masks) for split, part in entries.items()}
    classes = max(categories) + 1
    names = [categories.get(i, "") for i in range(classes)]
    return Data(str(path), "object-detection", {**splits}, {"num_classes": classes}, names, notes, {"path": str(path)})


def _entries(file: CocoFile, categories: Mapping[int, str], strict: bool, notes: list[str]) -> list[dict[str, Any]]:
    out, outside, unknown, count = [], [], [], 0
    for image_id, marked in file.annotations.items():
        image = file.images[image_id]
        width, height = image.get("width"), image.get("height")
        if not width or not height:
            height, width = decode(image["path"]).shape[:2]
        truth, boxes, labels = [], [], []
        for a in marked:
            name = f"annotation {a.get('id')}"
            if a.get("category_id") not in categories:
                unknown.append(f"{name} (category {a.get('category_id')})")
                continue
            box = clip_box(a.get("bbox"), width, height)
            if box is None:
                outside.append(name)
                continue
            crowd = int(a.get("iscrowd") or 0)
            area = float(a.get("area") or box[2] * box[3])
            entry = {"id": a["id"], "image_id": image_id, "category_id": a["category_id"], "bbox": box, "area": area, "iscrowd": crowd}
            if a.get("segmentation"):
                entry["segmentation"] = a["segmentation"]
            truth.append(entry)
            if not crowd:
                boxes.append([box[0], box[1], box[0] + box[2], box[1] + box[3]])
                labels.append(a["category_id"])
        count += len(boxes)
        out.append(
            {
                "path": image["path"],
                "id": os.path.basename(image["path"]),
                "image_id": image_id,
                "boxes": np.array(boxes, dtype=np.float32).reshape(-1, 4),
                "labels": np.array(labels, dtype=np.int64),
                "truth": truth,
            }
        )
    for what, names in [("boxes outside of their image or empty", outside), ("categories that the file doesn't list", unknown)]:
        if names and strict:
            raise BadInput(f"{file.path}: {what}", expected="none", got=few(names))
        if names:
            notes.append(f"{len(names)} objects left out, {what}: {few(names)}")
    if not count:
        raise BadInput(str(file.path), expected="objects with a box inside their image and a known category", got="none")
    return out


def inputs(paths: Sequence[str | Path]) -> Scenes:
    """Pictures without annotations: files, folders, globs."""
    found = pictures.inputs(paths)
    return Scenes([{"path": p, "id": os.path.relpath(p, found.root)} for p in found.paths])


def is_single(value: Any) -> bool:
    return pictures.is_single(value)


def from_memory(value: Any, index: int) -> Sample:
    """A picture in memory, or a raw sample as a dict."""
    return pictures.from_memory(value, index)


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Pictures in the upper left corners of the largest size, objects padded to the largest number."""
    import torch

    height, width = (max(s["image"].shape[i] for s in samples) for i in (1, 2))
    most = max(1, max(len(s["labels"]) for s in samples))
    n = len(samples)
    image = torch.zeros(n, 3, height, width)
    padding = torch.ones(n, height, width, dtype=torch.bool)
    boxes, labels = torch.zeros(n, most, 4), torch.full((n, most), -1, dtype=torch.int64)
    drawn = all("masks" in s for s in samples)
    masks = torch.zeros(n, most, height, width, dtype=torch.bool) if drawn else None
    for i, s in enumerate(samples):
        h, w = s["image"].shape[1:]
        image[i, :, :h, :w] = torch.from_numpy(s["image"])
        padding[i, :h, :w] = False
        count = len(s["labels"])
        boxes[i, :count], labels[i, :count] = torch.from_numpy(s["boxes"]), torch.from_numpy(s["labels"])
        if masks is not None:
            masks[i, :count, :h, :w] = torch.from_numpy(s["masks"])
    out: dict[str, Any] = {
        "id": [s["id"] for s in samples],
        "image": image,
        "padding": padding,
        "size": torch.tensor([s["image"].shape[1:] for s in samples]),
        "original_size": torch.from_numpy(np.stack([s["original_size"] for s in samples])),
        "boxes": boxes,
        "labels": labels,
    }
    if masks is not None:
        out["masks"] = masks
    for key in ("truth", "image_id"):
        if all(key in s for s in samples):
            out[key] = [s[key] for s in samples]
    return out
