"""Reading images with a class each, and boxes for those that are evaluated.

folder of classes   class/name.jpg, or train/class/name.jpg and val/class/name.jpg, and beside them
                    boxes.csv   columns image, x0, y0, x1, y1 (a row a box; the image's path below the folder), or
                    boxes.json  {"class/name.jpg": [[x0, y0, x1, y1], ...]}
CUB-200-2011        images.txt, image_class_labels.txt, train_test_split.txt, bounding_boxes.txt, classes.txt, images/
VOC annotations     Annotations/**/name.xml for images of the same name, as ImageNet's localisation set has them: the class is the folder,
                    or where images lie in one folder (ImageNet's val) the first object's name
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from formarium.errors import BadInput
from formarium.task import Data, Sample
from formarium.tasks.image_classification import data as images
from formarium.tasks.image_classification.augment import jitter
from formarium.tasks.image_classification.data import FORMATS, Images, decode, from_memory, inputs, is_single

__all__ = ["Boxed", "BoxedFiles", "Prepare", "collate", "from_memory", "inputs", "is_single", "read"]

_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_COLUMNS = (("image", "file", "filename", "path"), ("x0", "xmin", "left"), ("y0", "ymin", "top"), ("x1", "xmax", "right"),
            ("y1", "ymax", "bottom"))  # fmt: skip
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Boxed:
    """Images in memory: uint8 [samples, height, width, 3], labels, ids, and boxes (float [n, 4] a sample) where there are any."""

    images: np.ndarray
    labels: np.ndarray
    ids: list[str]
    boxes: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        sample = {"image": self.images[index], "label": int(self.labels[index]), "id": self.ids[index]}
        return sample if self.boxes is None else {**sample, "boxes": self.boxes[index]}


@dataclass
class BoxedFiles:
    """Image files, and boxes of theirs by path (float32 [n, 4], (left, top, right, bottom) in pixels)."""

    files: Images
    boxes: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def labels(self) -> Sequence[int]:
        return self.files.labels or ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        sample, boxes = self.files[index], self.boxes.get(self.files.paths[index])
        return sample if boxes is None else {**sample, "boxes": boxes}


def read(path: str | Path, *, holdout: float = 0.2, seed: int = 0, keep_pixels: int = 200_000_000) -> Data:
    """Images, classes and boxes of a folder in one of the layouts above. holdout, seed, keep_pixels: as for image classification.

    Held-out images without a box are left out and counted in `notes`. Raises BadInput: nothing there, one class only, files that are named
    but missing, boxes that are malformed, empty or outside of their image, held-out images without any box.
    """
    root = Path(path)
    if not root.is_dir():
        raise BadInput(str(path), expected="a folder", got="a file" if root.exists() else "no such path")
    nested = root / "CUB_200_2011"
    if (nested / "images.txt").is_file():
        root = nested
    if (root / "images.txt").is_file():
        data, boxes = _cub(root)
    elif (root / "Annotations").is_dir():
        data, boxes = _voc(root, holdout, seed)
    else:
        listed = [f for f in (root / "boxes.csv", root / "boxes.json") if f.is_file()]
        if not listed:
            known = "boxes.csv, boxes.json, CUB's images.txt, or Annotations/ beside the images"
            fix = "write boxes.csv with the columns image, x0, y0, x1, y1"
            raise BadInput(str(path), expected=known, got="none of them", fix=fix)
        boxes = _csv(listed[0], root) if listed[0].suffix == ".csv" else _json(listed[0], root)
        data = images.read(root, holdout=holdout, seed=seed, keep_pixels=keep_pixels)
    return _joined(data, boxes, root)


def _joined(data: Data, boxes: Mapping[str, np.ndarray], root: Path) -> Data:
    """The splits with their boxes; those that are evaluated keep only images that have one."""
    notes, splits = [*data.notes], {}
    for split, found in data.splits.items():
        files: Any = found
        if split == "train":
            splits[split] = BoxedFiles(files)
            continue
        kept = [i for i, p in enumerate(files.paths) if p in boxes]
        if not kept:
            raise BadInput(str(root), expected=f"boxes for the images of {split!r}", got=f"none for any of its {len(files.paths)}")
        if len(kept) < len(files.paths):
            notes.append(f"{len(files.paths) - len(kept)} images of {split!r} without a box left out")
        own = Images(files.root, [files.paths[i] for i in kept], [files.labels[i] for i in kept], files.keep)
        for p in own.paths:
            _must_lie_inside(p, boxes[p], root)
        splits[split] = BoxedFiles(own, {p: boxes[p] for p in own.paths})
    return Data(root.name, "object-localisation", {**splits}, dict(data.model_args), data.names, notes, {"path": str(root)})


def _must_lie_inside(path: str, boxes: np.ndarray, root: Path) -> None:
    height, width = _size(path)
    x0, y0, x1, y1 = boxes.T
    outside = (x0 < -1) | (y0 < -1) | (x1 > width + 1) | (y1 > height + 1)  # a pixel is what conventions differ by
    if outside.any():
        got = ", ".join(f"{v:g}" for v in boxes[outside][0])
        raise BadInput(f"the box of {os.path.relpath(path, root)}", expected=f"one inside the image ({width} x {height} pixels)", got=got)


def _size(path: str) -> tuple[int, int]:
    """(height, width) as a viewer shows the image."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # what Pillow doesn't take
        try:
            h, w, _ = decode(path).shape
        except Exception:
            raise BadInput(path, expected="an image", got="a file that can't be decoded as one") from None
        return h, w


# lists of boxes -----------------------------------------------------------------------------------------------------


def _box(values: Sequence[Any], where: str) -> np.ndarray:
    try:
        box = np.array([float(v) for v in values], dtype=np.float32)
    except (TypeError, ValueError):
        box = np.empty(0, dtype=np.float32)
    if box.shape != (4,) or not np.isfinite(box).all():
        raise BadInput(where, expected="four numbers x0, y0, x1, y1", got=str(values))
    if box[2] <= box[0] or box[3] <= box[1]:
        raise BadInput(where, expected="x0 < x1 and y0 < y1", got=", ".join(f"{v:g}" for v in box))
    return box


def _existing(root: Path, name: str, where: str) -> str:
    if not (root / name).is_file():
        raise BadInput(where, expected="images that are there", got=f"{name}, which is not")
    return str(root / name)


def _csv(path: Path, root: Path) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = {h.strip().lower(): h for h in reader.fieldnames or ()}
        chosen = [next((header[a] for a in names if a in header), None) for names in _COLUMNS]
        if None in chosen:
            raise BadInput(str(path), expected="the columns image, x0, y0, x1, y1", got=", ".join(header) or "an empty file")
        for row in reader:
            name, *values = (row[c] for c in chosen if c is not None)
            where = f"{path.name} line {reader.line_num}"
            found.setdefault(_existing(root, name, where), []).append(_box(values, where))
    return {k: np.stack(v) for k, v in found.items()}


def _json(path: Path, root: Path) -> dict[str, np.ndarray]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise BadInput(str(path), expected="JSON", got=str(e)) from None
    if not isinstance(said, dict):
        raise BadInput(str(path), expected="an object of boxes by image", got=type(said).__name__)
    found = {}
    for name, boxes in said.items():
        where = f"{path.name} {name!r}"
        rows = boxes if isinstance(boxes, list) and boxes and isinstance(boxes[0], list) else [boxes]
        found[_existing(root, name, where)] = np.stack([_box(b if isinstance(b, list) else [b], where) for b in rows])
    return found


# CUB-200-2011 -------------------------------------------------------------------------------------------------------


def _table(path: Path, columns: int) -> dict[str, list[str]]:
    """A file of CUB: an id, then so many words a line."""
    if not path.is_file():
        raise BadInput(str(path), expected="one of CUB-200-2011's files", got="no such file")
    out = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != columns + 1:
            raise BadInput(f"{path.name} line {number}", expected=f"an id and {columns} values", got=line.strip())
        out[words[0]] = words[1:]
    return out


def _cub(root: Path) -> tuple[Data, dict[str, np.ndarray]]:
    names = {i: words[0] for i, words in _table(root / "classes.txt", 1).items()}
    paths = {i: words[0] for i, words in _table(root / "images.txt", 1).items()}
    labels, parts = _table(root / "image_class_labels.txt", 1), _table(root / "train_test_split.txt", 1)
    rows = _table(root / "bounding_boxes.txt", 4)
    for what, table in (("image_class_labels.txt", labels), ("train_test_split.txt", parts), ("bounding_boxes.txt", rows)):
        missing = [i for i in paths if i not in table]
        if missing:
            raise BadInput(what, expected="a line for every image", got=f"none for image {missing[0]} ({paths[missing[0]]})")
    order = {i: k for k, i in enumerate(names)}
    strange = [i for i in paths if labels[i][0] not in order]
    if strange:
        raise BadInput("image_class_labels.txt", expected="classes of classes.txt", got=f"class {labels[strange[0]][0]}")
    boxes = {}
    for i, name in paths.items():
        full = _existing(root / "images", name, "images.txt")
        where = f"bounding_boxes.txt image {i}"
        try:
            x, y, w, h = map(float, rows[i])
        except ValueError:
            raise BadInput(where, expected="four numbers x, y, width, height", got=" ".join(rows[i])) from None
        boxes[full] = _box((x, y, x + w, y + h), where)[None]
    splits = {}
    for split, flag in (("train", "1"), ("val", "0")):
        chosen = [i for i in paths if parts[i][0] == flag]
        if not chosen:
            raise BadInput("train_test_split.txt", expected="images to train on (1) and to test on (0)", got=f"no {flag}")
        splits[split] = Images(str(root), [str(root / "images" / paths[i]) for i in chosen], [order[labels[i][0]] for i in chosen])
    return _classes(root, splits, [*names.values()]), boxes


def _classes(root: Path, splits: Mapping[str, Images], names: list[str]) -> Data:
    used = {label for s in splits.values() for label in s.labels or ()}
    if len(used) < 2:
        raise BadInput(str(root), expected="at least two classes", got=f"one: {names[used.pop()]}" if used else "none")
    return Data(root.name, "object-localisation", {**splits}, {"num_classes": len(names)}, names, [], {"path": str(root)})


# VOC annotations ----------------------------------------------------------------------------------------------------


def parse_voc(path: Path) -> tuple[str, np.ndarray]:
    """(the first object's name, all objects' boxes float32 [n, 4]) of an annotation."""
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
    except ElementTree.ParseError as e:
        raise BadInput(str(path), expected="a VOC annotation", got=f"broken XML: {e}") from None
    if not objects:
        raise BadInput(str(path), expected="a VOC annotation with objects", got="none")
    boxes = [_box([o.findtext(f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax")], str(path)) for o in objects]
    return objects[0].findtext("name") or "", np.stack(boxes)


def _voc(root: Path, holdout: float, seed: int) -> tuple[Data, dict[str, np.ndarray]]:
    notes = root / "Annotations"
    annotated = {p.stem: p for p in sorted(notes.rglob("*.xml"))}
    files = [p for p in sorted(root.rglob("*")) if p.suffix.lower() in FORMATS and notes not in p.parents]
    if not files or not annotated:
        raise BadInput(str(root), expected="images, and XML files in Annotations/", got=f"{len(files)} images, {len(annotated)} XML files")
    absent = sorted({*annotated} - {p.stem for p in files})
    if absent:
        raise BadInput(f"Annotations/**/{absent[0]}.xml", expected="an image of that name", got="none")
    parsed = {p: parse_voc(annotated[p.stem]) for p in files if p.stem in annotated}
    plain = {"images", "jpegimages", "data", "cls-loc", *_SPLITS}
    found: dict[str, dict[str, list[Path]]] = {}
    for p in files:
        folders = p.relative_to(root).parts[:-1]
        split = next((_SPLITS[f.lower()] for f in folders if f.lower() in _SPLITS), "all")
        name = folders[-1] if folders and folders[-1].lower() not in plain else parsed[p][0] if p in parsed else ""
        if name:  # an image in no class's folder and without an annotation says nothing
            found.setdefault(split, {}).setdefault(name, []).append(p)
    names = sorted({n for classes in found.values() for n in classes})
    if len(names) < 2:
        raise BadInput(str(root), expected="at least two classes", got=f"one: {names[0]}" if names else "none")
    splits = found if "train" in found and len(found) > 1 else images._split(_merged(found), names, holdout, seed)
    images._must_share_classes(splits, names)
    sets = {
        split: Images(str(root), [str(p) for n in names for p in by.get(n, [])], [i for i, n in enumerate(names) for _ in by.get(n, [])])
        for split, by in splits.items()
    }
    if "val" not in sets:
        sets["val"] = sets["test"]
    return _classes(root, sets, names), {str(p): boxes for p, (_, boxes) in parsed.items()}


def _merged(found: Mapping[str, Mapping[str, list[Path]]]) -> dict[str, list[Path]]:
    out: dict[str, list[Path]] = {}
    for classes in found.values():
        for name, files in classes.items():
            out.setdefault(name, []).extend(files)
    return out


# into batches -------------------------------------------------------------------------------------------------------


@dataclass
class Prepare:
    """A raw sample to what a batch holds. The image is squeezed to size / crop, whatever its shape, and the centre is cut out
    (preprocessing: size, crop, interpolation); boxes go with it. With a recipe: cut anywhere (random_crop), flipped (hflip), jittered
    (color_jitter), and no boxes."""

    preprocessing: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        size = self.preprocessing.get("size", 224)
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)  # type: ignore[assignment]
        crop = self.preprocessing.get("crop", 0.875)
        self.full = tuple(round(s / crop) for s in self.size)
        self.resample = _RESAMPLE[self.preprocessing.get("interpolation", "bilinear")]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image, r = sample["image"], self.recipe or {}
        own = image.shape[:2]
        if own != self.full:
            image = np.asarray(Image.fromarray(image).resize((self.full[1], self.full[0]), self.resample))
        spare = [f - s for f, s in zip(self.full, self.size, strict=True)]
        top, left = (int(rng.integers(0, s + 1)) if r.get("random_crop") else s // 2 for s in spare)
        image = image[top : top + self.size[0], left : left + self.size[1]]
        if r.get("hflip") and rng.random() < r["hflip"]:
            image = image[:, ::-1]
        if r.get("color_jitter"):
            image = np.asarray(jitter(Image.fromarray(np.ascontiguousarray(image)), r["color_jitter"], rng))
        scale = np.array([own[1] / self.full[1], own[0] / self.full[0]] * 2, dtype=np.float32)
        corner = np.array([left, top, left, top], dtype=np.float32)
        whole = np.array([0, 0, self.size[1], self.size[0]], dtype=np.float32)
        out = {k: v for k, v in sample.items() if k in ("id", "label")}
        out["image"] = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) * np.float32(1 / 255)
        out["visible"], out["pixels"] = (whole + corner) * scale, np.array(own, dtype=np.int64)
        out["size"] = np.array(self.size, dtype=np.int64)
        if self.recipe is None and "boxes" in sample:
            out["boxes"] = (np.asarray(sample["boxes"], dtype=np.float32) / scale - corner).clip(0, np.tile(whole[2:], 2))
        return out


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents."""
    import torch

    batch: dict[str, Any] = {k: torch.from_numpy(np.stack([s[k] for s in samples])) for k in ("image", "visible", "pixels", "size")}
    batch["id"] = [s["id"] for s in samples]
    if all("label" in s for s in samples):
        batch["label"] = torch.tensor([s["label"] for s in samples], dtype=torch.int64)
    if all("boxes" in s for s in samples):
        most = max(len(s["boxes"]) for s in samples)
        padded = np.full((len(samples), most, 4), math.nan, dtype=np.float32)
        for row, s in zip(padded, samples, strict=True):
            row[: len(s["boxes"])] = s["boxes"]
        batch["boxes"] = torch.from_numpy(padded)
    return batch
