"""COCO's json files: reading, checking, finding their images, splitting. Shared by the tasks whose files these are.

folder/annotations/NAME_train2017.json, NAME_val2017.json   and images in folder/train2017, folder/val2017, folder/images or folder
folder/train.json, val.json                                 the same, beside the images
file.json                                                   split by the seed, a fifth of the images held out
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from formarium.errors import BadInput, MissingExtra

SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}


@dataclass
class CocoFile:
    """One file: images by id (dicts with `path`, `width`, `height` where given), annotations by image id, category names by id."""

    path: Path
    images: dict[Any, dict[str, Any]]
    annotations: dict[Any, list[dict[str, Any]]]
    categories: dict[Any, str]
    notes: list[str] = field(default_factory=list)


def load_json(path: Path) -> Any:
    """A json file's value. BadInput where there is none or it doesn't parse."""
    if not path.is_file():
        raise BadInput(str(path), expected="a COCO json file", got="no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as e:
        raise BadInput(str(path), expected="a COCO json file", got=f"no valid json ({str(e).splitlines()[0]})") from None


def read_file(path: Path, images: str | Path | None = None, strict: bool = False, kind: str = "") -> CocoFile:
    """One annotation file with the images it names.

    images: the folder they are in, where it is not one of the usual places. strict: fail on missing images and unusable annotations, rather
    than leave them out and say so in `notes`. kind: a word its name should have where a folder holds several ("keypoints", "instances").
    Raises BadInput: no json, no COCO file, no annotations, no image found.
    """
    found = load_json(path)
    lists = {key: found.get(key) if isinstance(found, Mapping) else None for key in ("images", "annotations", "categories")}
    missing = [key for key in ("images", "annotations") if not isinstance(lists[key], list)]
    if missing:
        raise BadInput(str(path), expected="a COCO file with the lists images and annotations", got=f"none called {', '.join(missing)}")
    if not lists["annotations"]:
        raise BadInput(str(path), expected="annotations", got="an empty list")
    categories = {c.get("id"): str(c.get("name", c.get("id"))) for c in lists["categories"] or []}
    folders = _folders(path, images)
    kept: dict[Any, dict[str, Any]] = {}
    absent: list[str] = []
    for image in lists["images"]:
        if not isinstance(image, Mapping) or "id" not in image or "file_name" not in image:
            raise BadInput(f"{path}: images", expected="entries with id and file_name", got=str(image)[:60])
        place = next((f / image["file_name"] for f in folders if (f / image["file_name"]).is_file()), None)
        if place is None:
            absent.append(str(image["file_name"]))
        else:
            kept[image["id"]] = {**image, "path": str(place)}
    notes = []
    if absent and (strict or not kept):
        where = ", ".join(str(f) for f in folders)
        raise BadInput(
            f"{len(absent)} images of {path}", expected=f"files in {where}", got=f"none called {few(absent)}", fix="give images="
        )
    if absent:
        notes.append(f"{len(absent)} images that {path.name} names are missing and left out: {few(absent)}")
    annotations: dict[Any, list[dict[str, Any]]] = {i: [] for i in kept}
    known, strays = {i["id"] for i in lists["images"]}, 0
    for n, annotation in enumerate(lists["annotations"]):
        if not isinstance(annotation, Mapping) or "image_id" not in annotation:
            raise BadInput(f"{path}: annotation {n}", expected="an entry with image_id", got=str(annotation)[:60])
        if annotation["image_id"] in annotations:
            annotations[annotation["image_id"]].append(dict(annotation))
        elif annotation["image_id"] not in known:
            strays += 1
    if strays and strict:
        raise BadInput(f"{strays} annotations of {path}", expected="an image_id that the file's images have", got="others")
    if strays:
        notes.append(f"{strays} annotations of images that {path.name} doesn't list are left out")
    return CocoFile(path, kept, annotations, categories, notes)


def find_files(path: str | Path, kind: str = "") -> dict[str, Path]:
    """Annotation files by split ("train", "val", "test"), or {"all": file} for a single one. kind: preferred among several of a split."""
    root = Path(path)
    if not root.exists():
        raise BadInput(str(path), expected="a COCO json file, or a folder with some", got="no such path")
    if root.is_file():
        return {"all": root}
    files = sorted([*root.glob("*.json"), *root.glob("annotations/*.json")])
    if not files:
        raise BadInput(str(path), expected="COCO json files in it or in its folder annotations", got="none")
    preferred = [f for f in files if kind and kind in f.stem] or files
    splits: dict[str, Path] = {}
    for file in preferred:
        for word, split in SPLITS.items():
            if word in file.stem.lower():
                splits.setdefault(split, file)
                break
    if "train" in splits and len(splits) > 1:
        return splits
    if len(preferred) > 1 and "train" not in splits:
        names = few([f.name for f in preferred])
        raise BadInput(str(path), expected="files named ..train.. and ..val.., or a single one", got=names, fix="give the file")
    return {"all": splits.get("train", preferred[0])}


def hold_out(images: Sequence[Any], share: float, seed: int, path: str | Path) -> tuple[list[Any], list[Any]]:
    """(kept, held out) image ids, split by the seed. BadInput where there are fewer than two."""
    if len(images) < 2:
        raise BadInput(str(path), expected="at least two annotated images, to hold one out", got=str(len(images)))
    order = np.random.default_rng(seed).permutation(len(images))
    held = {*order[: max(1, round(share * len(images)))].tolist()}
    return [i for n, i in enumerate(images) if n not in held], [i for n, i in enumerate(images) if n in held]


def clip_box(box: Any, width: float, height: float) -> list[float] | None:
    """[x, y, w, h] cut to the image; None where it isn't four finite numbers, or nothing of it is inside."""
    try:
        x, y, w, h = (float(v) for v in box)
    except (TypeError, ValueError):
        return None
    if not np.isfinite([x, y, w, h]).all() or w <= 0 or h <= 0:
        return None
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    return [left, top, right - left, bottom - top] if right > left and bottom > top else None


def few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _folders(path: Path, images: str | Path | None) -> list[Path]:
    if images is not None:
        if not Path(images).is_dir():
            raise BadInput(str(images), expected="the folder of the images", got="no such folder")
        return [Path(images)]
    roots = [path.parent, path.parent.parent] if path.parent.name == "annotations" else [path.parent]
    split = next((w for w in ("train2017", "val2017", "test2017", "train", "val", "test") if w in path.stem), "")
    out = []
    for root in reversed(roots):
        out += [root / split] if split and (root / split).is_dir() else []
        out += [root / "images"] if (root / "images").is_dir() else []
        out += [root / "images" / split] if split and (root / "images" / split).is_dir() else []
        out.append(root)
    return out


def result_list(path: Path, folder_new: list[dict[str, Any]], key: str = "image_id") -> None:
    """Put results into a COCO results file: those of images it already has are replaced, others stay."""
    old = load_json(path) if path.is_file() else []
    fresh = {r[key] for r in folder_new}
    path.write_text(json.dumps([*(r for r in old if r[key] not in fresh), *folder_new]), encoding="utf-8")


def pycocotools(part: str) -> Any:
    """A module of the pycocotools package. Raises MissingExtra where it isn't installed."""
    try:
        return import_module(f"pycocotools.{part}")
    except ImportError:
        raise MissingExtra("pycocotools", "detection") from None
