"""Reading COCO keypoint files and pictures of people.

A raw sample is one person: image (uint8 [height, width, 3], the whole picture), box (float32 [4]: x, y, width, height), id, and where
annotated keypoints (float32 [joints, 3]: x, y, visibility 0 unmarked, 1 hidden, 2 visible) and truth (its COCO annotation, in a list).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from formarium.errors import BadInput
from formarium.task import Data, Sample
from formarium.tasks.human_pose.joints import JOINTS
from formarium.tasks.image_classification import data as images
from formarium.tasks.object_detection.coco import CocoFile, clip_box, few, find_files, hold_out, load_json, read_file


@dataclass
class People:
    """People by index. Each entry holds the path of its image (or the image itself) and what a raw sample holds beside it."""

    entries: list[dict[str, Any]]
    root: str = "."
    _last: tuple[str, np.ndarray] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = dict(self.entries[index])
        path = entry.pop("path", None)
        if path is not None:
            if self._last is None or self._last[0] != path:  # people of one picture follow one another
                self._last = (path, decode(path))
            entry["image"] = self._last[1]
        if "box" not in entry:
            height, width = entry["image"].shape[:2]
            entry["box"] = np.array([0, 0, width, height], dtype=np.float32)
        return entry


def decode(path: str) -> np.ndarray:
    """An image file as uint8 RGB. BadInput where it can't be decoded."""
    try:
        return images.decode(path)
    except Exception as e:
        raise BadInput(path, expected="an image that decodes", got=f"{type(e).__name__}") from None


def read(
    path: str | Path,
    *,
    images: str | Path | None = None,
    boxes: str | Path | None = None,
    strict: bool = False,
    holdout: float = 0.2,
    seed: int = 0,
) -> Data:
    """The people of COCO keypoint files: a json file, or a folder with some (see tasks/object_detection/coco.py for the layouts).

    images: the folder of the images. boxes: a COCO results file with detected boxes for "val", in place of the annotated ones. strict:
    fail on what can't be used, rather than leave it out and say so in `notes`. holdout, seed: of a single file's split, by images.
    Raises BadInput: no such path, no COCO json, no annotations, no person with keypoints, missing images, another number of joints.
    """
    files = find_files(path, "keypoints")
    notes: list[str] = []
    found = {split: read_file(file, images, strict) for split, file in files.items()}
    for file in found.values():
        notes += file.notes
    people = {split: _people(file, strict, notes) for split, file in found.items()}
    if "all" in people:
        owners = sorted({e["truth"][0]["image_id"] for e in people["all"]}, key=str)
        kept, held = hold_out(owners, holdout, seed, path)
        parts = {"train": {*kept}, "val": {*held}}
        people = {split: [e for e in people["all"] if e["truth"][0]["image_id"] in part] for split, part in parts.items()}
    if boxes is not None:
        split = "val" if "val" in people else next(iter(people))
        people[split] = _detected(Path(boxes), people[split], found.get(split) or found["all"])
    root = str(Path(path) if Path(path).is_dir() else Path(path).parent)
    splits = {split: People(entries, root) for split, entries in people.items()}
    return Data(str(path), "human-pose", {**splits}, {"num_joints": 17}, [*JOINTS], notes, {"path": str(path)})


def _people(file: CocoFile, strict: bool, notes: list[str]) -> list[dict[str, Any]]:
    """Entries of everyone with a box and a marked joint; crowds and others are left out as the field does."""
    entries, bad, unknown = [], [], []
    for image_id, marked in file.annotations.items():
        image = file.images[image_id]
        for a in marked:
            name = f"annotation {a.get('id')}"
            if file.categories and a.get("category_id") not in file.categories:
                unknown.append(f"{name} (category {a.get('category_id')})")
                continue
            if a.get("iscrowd") or file.categories.get(a.get("category_id"), "person") != "person":
                continue
            marks = a.get("keypoints")
            if marks is None or not any(marks):
                continue
            if len(marks) != 51:
                raise BadInput(f"{file.path}: {name}", expected="17 joints as 51 numbers (x, y, visibility)", got=f"{len(marks)} numbers")
            width, height = image.get("width"), image.get("height")
            if not width or not height:
                height, width = decode(image["path"]).shape[:2]
            box = clip_box(a.get("bbox"), width, height)
            if box is None:
                bad.append(name)
                continue
            joints = np.array(marks, dtype=np.float32).reshape(17, 3)
            truth = _truth(a, image_id, box, joints)
            entries.append(
                {
                    "path": image["path"],
                    "id": f"{os.path.basename(image['path'])}#{a.get('id')}",
                    "box": np.array(box, dtype=np.float32),
                    "keypoints": joints,
                    "truth": [truth],
                }
            )
    for what, names in [("boxes outside of their image or empty", bad), ("categories that the file doesn't list", unknown)]:
        if names and strict:
            raise BadInput(f"{file.path}: {what}", expected="none", got=few(names))
        if names:
            notes.append(f"{len(names)} people left out, {what}: {few(names)}")
    if not entries:
        raise BadInput(str(file.path), expected="people with keypoints (annotations with 51 numbers)", got="none that can be used")
    return entries


def _truth(a: Mapping[str, Any], image_id: Any, box: Sequence[float], joints: np.ndarray) -> dict[str, Any]:
    """A COCO annotation with what its evaluation needs."""
    return {
        "id": a["id"],
        "image_id": image_id,
        "category_id": 1,
        "bbox": [float(v) for v in box],
        "area": float(a.get("area") or box[2] * box[3]),
        "iscrowd": 0,
        "keypoints": [float(v) for v in joints.ravel()],
        "num_keypoints": int((joints[:, 2] > 0).sum()),
    }


def _detected(path: Path, people: list[dict[str, Any]], file: CocoFile) -> list[dict[str, Any]]:
    """Detected boxes as samples; each brings the annotations of its image, and the first those of images without a box."""
    results = load_json(path)
    if not isinstance(results, list) or not all(isinstance(r, Mapping) and {"image_id", "bbox", "score"} <= {*r} for r in results):
        raise BadInput(str(path), expected="a list of detections with image_id, bbox and score", got="something else")
    truths: dict[Any, list[dict[str, Any]]] = {}
    for entry in people:
        truths.setdefault(entry["truth"][0]["image_id"], []).append(entry["truth"][0])
    out = []
    for n, r in enumerate(results):
        image = file.images.get(r["image_id"])
        if image is None or r["image_id"] not in truths or r.get("category_id", 1) != 1:
            continue
        box = clip_box(r["bbox"], image.get("width", np.inf), image.get("height", np.inf))
        if box is not None:
            entry = {"path": image["path"], "id": f"{os.path.basename(image['path'])}#box{n}", "box": np.array(box, dtype=np.float32)}
            out.append({**entry, "box_score": float(r["score"]), "truth": truths[r["image_id"]]})
    if not out:
        raise BadInput(str(path), expected="boxes of people in the held-out images", got="none")
    seen = {t["image_id"] for e in out for t in e["truth"]}
    out[0]["truth"] = [*out[0]["truth"], *(t for i, ts in truths.items() if i not in seen for t in ts)]
    return out


def inputs(paths: Sequence[str | Path]) -> People:
    """Pictures of one person each (files, folders, globs), or COCO json files, whose people's boxes are taken."""
    entries: list[dict[str, Any]] = []
    pictures = []
    for path in paths:
        if str(path).endswith(".json"):
            file = read_file(Path(path))
            for image_id, boxes in file.annotations.items():
                place = file.images[image_id]["path"]
                for a in boxes:
                    if (box := clip_box(a.get("bbox"), np.inf, np.inf)) is not None:
                        entries.append(
                            {"path": place, "id": f"{os.path.basename(place)}#{a.get('id')}", "box": np.array(box, dtype=np.float32)}
                        )
        else:
            pictures.append(path)
    if pictures:
        found = images.inputs(pictures)
        entries += [{"path": p, "id": os.path.relpath(p, found.root)} for p in found.paths]
    if not entries:
        raise BadInput(", ".join(map(str, paths)), expected="pictures, or a COCO json with boxes", got="none")
    return People(entries)


def is_single(value: Any) -> bool:
    return images.is_single(value)


def from_memory(value: Any, index: int) -> Sample:
    """A picture in memory, the person filling it; or a dict with image and box."""
    if not isinstance(value, Mapping):
        value = images.from_memory(value, index)
    if "image" not in value:
        raise BadInput(f"input {index}", expected="a dict with image and box", got=", ".join(value))
    height, width = value["image"].shape[:2]
    box = clip_box(value.get("box", (0, 0, width, height)), width, height)
    if box is None:
        raise BadInput(f"input {index}: box", expected=f"x, y, width, height inside {width}x{height} pixels", got=str(value.get("box")))
    return {"id": f"input {index}", **value, "box": np.array(box, dtype=np.float32)}


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    import torch

    out: dict[str, Any] = {"id": [s["id"] for s in samples]}
    for key in ("image", "centre", "extent", "box", "box_score", "keypoints", "visible"):
        if all(key in s for s in samples):
            out[key] = torch.from_numpy(np.stack([s[key] for s in samples]))
    if all("truth" in s for s in samples):
        out["truth"] = [s["truth"] for s in samples]
    return out
