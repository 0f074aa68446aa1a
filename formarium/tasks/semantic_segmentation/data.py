"""Pictures with a mask beside each, as people keep them.

folder/images/NAME.jpg + folder/masks/NAME.png                       a fifth held out by the seed
folder/train/images/... + folder/train/masks/...                     and val/ (and test/) likewise
folder/images/training/... + folder/annotations/training/...         and validation/: ADE20K's layout, where 0 is no class
folder/leftImg8bit/train/CITY/*_leftImg8bit.png + folder/gtFine/...  Cityscapes' layout, its 19 classes from *_gtFine_labelIds.png

Masks are single-channel or indexed images whose pixels are class numbers; 255 is a pixel without class. classes.txt, one name a line (or
"number name"), names them where it is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from formarium.errors import BadInput
from formarium.task import Data, Sample, file_stem
from formarium.tasks.image_classification.data import array_to_rgb, decode
from formarium.tasks.semantic_segmentation.model import IGNORE
from formarium.tasks.semantic_segmentation.prepare import collate as collate

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
NO_CLASS = 255
CITYSCAPES = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light", 20: "traffic sign",
              21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
              32: "motorcycle", 33: "bicycle"}  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """Pictures and masks on disk. table: int64 [256], a mask's value to a class number (-1: none); without masks, pictures alone."""

    images: tuple[str, ...]
    masks: tuple[str, ...]
    table: np.ndarray | None
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = {"id": self.ids[index], "image": decode(self.images[index])}
        if self.masks:
            assert self.table is not None
            sample["label"] = self.table[read_mask(self.masks[index])]
            if sample["label"].shape != sample["image"].shape[:2]:
                h, w = sample["image"].shape[:2]
                got = "x".join(map(str, sample["label"].shape))
                raise BadInput(self.masks[index], expected=f"a mask of the picture's size, {h}x{w}", got=got)
        return sample


def read_mask(path: str | Path) -> np.ndarray:
    """Class numbers, uint8 [height, width]. Raises BadInput for a colour picture or what can't be decoded."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except OSError as e:
        raise BadInput(str(path), expected="a mask image", got=f"one that can't be decoded ({e})") from None
    if values.ndim != 2:
        raise BadInput(str(path), expected="a mask with one channel of class numbers", got=f"{values.shape[-1]} channels",
                       fix="save it as an indexed or grey PNG")  # fmt: skip
    if values.dtype != np.uint8 and (values.min() < 0 or values.max() > 255):
        raise BadInput(str(path), expected="class numbers from 0 to 255", got=f"{values.min()} to {values.max()}")
    return values.astype(np.uint8)


def read(
    path: str | Path, *, strict: bool = False, holdout: float = 0.2, seed: int = 0, zero_is_no_class: bool | None = None
) -> Data:  # fmt: skip
    """The data in a folder of one of the layouts above.

    strict: a picture without mask, or that can't be decoded, is an error rather than left out and named in `notes`.
    holdout, seed: of the split, where the folder has none. zero_is_no_class: whether mask value 0 is no class (by default in ADE20K's
    layout).
    Raises BadInput where there are no pairs, one class only, a mask of another size than its picture, or too few pictures.
    """
    root = Path(path)
    if not root.is_dir():
        raise BadInput(str(path), expected="a folder of images and masks", got="a file" if root.exists() else "nothing there")
    notes: list[str] = []
    ade = (root / "images" / "training").is_dir() and (root / "annotations").is_dir()
    if (root / "leftImg8bit").is_dir():
        found = _cityscapes(root)
    elif ade:
        found = {
            name: _pairs(root / "images" / theirs, root / "annotations" / theirs, root, notes)
            for name, theirs in (("train", "training"), ("val", "validation"))
        }
    else:
        found = {
            s: _pairs(root / s / "images", root / s / "masks", root, notes)
            for s in ("train", "val", "test")
            if (root / s / "images").is_dir()
        }
        if not found:
            found = _split(_pairs(root / "images", root / "masks", root, notes), holdout, seed, root)
    found = {s: pairs for s, pairs in found.items() if pairs}
    if "train" not in found or "val" not in found:
        there = ", ".join(sorted(p.name for p in root.iterdir())[:6]) or "nothing"
        raise BadInput(str(root), expected="images/ and masks/ with files of the same names (or train/ and val/ of those)", got=there)
    if strict and notes:
        raise BadInput(str(root), expected="a mask for every picture", got="; ".join(notes))
    if (root / "leftImg8bit").is_dir():
        table = np.full(256, IGNORE)
        table[[*CITYSCAPES]] = np.arange(len(CITYSCAPES))
        names = [*CITYSCAPES.values()]
    else:
        table, names = _classes(found, root, ade if zero_is_no_class is None else zero_is_no_class)
    splits = {
        s: Pairs(tuple(str(i) for i, _ in pairs), tuple(str(m) for _, m in pairs), table, tuple(str(i.relative_to(root)) for i, _ in pairs))
        for s, pairs in found.items()
    }
    return Data(root.name, "semantic-segmentation", splits, {"num_classes": len(names)}, names, notes, {"path": str(root)})


def _pairs(images: Path, masks: Path, root: Path, notes: list[str]) -> list[tuple[Path, Path]]:
    if not images.is_dir() or not masks.is_dir():
        return []
    by_stem = {p.stem: p for p in sorted(masks.rglob("*")) if p.suffix.lower() in ENDINGS}
    pictures = [p for p in sorted(images.rglob("*")) if p.suffix.lower() in ENDINGS]
    lonely = [str(p.relative_to(root)) for p in pictures if p.stem not in by_stem]
    if lonely:
        notes.append(f"{len(lonely)} pictures without a mask left out: {', '.join(lonely[:5])}")
    return [(p, by_stem[p.stem]) for p in pictures if p.stem in by_stem]


def _cityscapes(root: Path) -> dict[str, list[tuple[Path, Path]]]:
    found = {}
    for split in ("train", "val"):
        pictures = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        masks = [root / "gtFine" / split / p.parent.name / p.name.replace("_leftImg8bit", "_gtFine_labelIds") for p in pictures]
        found[split] = [(p, m) for p, m in zip(pictures, masks, strict=True) if m.exists()]
    return found


def _split(pairs: list[tuple[Path, Path]], holdout: float, seed: int, root: Path) -> dict[str, list[tuple[Path, Path]]]:
    if not pairs:
        return {}
    if len(pairs) < 2:
        raise BadInput(str(root), expected="at least two pictures, one to train on and one to test on", got="one")
    order = np.random.default_rng(seed).permutation(len(pairs))
    held = {*order[: max(1, round(holdout * len(pairs)))].tolist()}
    return {
        "train": [p for i, p in enumerate(pairs) if i not in held],
        "val": [p for i, p in enumerate(pairs) if i in held],
    }


def _classes(found: Mapping[str, list[tuple[Path, Path]]], root: Path, zero_is_no_class: bool) -> tuple[np.ndarray, list[str]]:
    """The table from mask values to class numbers, and the names. Numbers that no mask has keep their place, up to the largest there is."""
    named: dict[int, str] = {}
    if (root / "classes.txt").exists():
        for i, line in enumerate((root / "classes.txt").read_text(encoding="utf-8").splitlines()):
            first, _, rest = line.strip().partition(" ")
            if first.isdigit() and rest:
                named[int(first)] = rest.strip()
            elif line.strip():
                named[i + int(zero_is_no_class)] = line.strip()
    seen = np.zeros(256, dtype=bool)
    for pairs in found.values():
        for _, mask in pairs:
            seen[np.unique(read_mask(mask))] = True
    seen[NO_CLASS] = False
    first = int(zero_is_no_class)
    last = max([int(v) for v in np.flatnonzero(seen)] + [*named])
    if seen[first:].sum() < 2:
        raise BadInput(str(root), expected="masks with at least two classes", got=f"{int(seen[first:].sum())}")
    table = np.full(256, IGNORE)
    table[first : last + 1] = np.arange(last + 1 - first)
    return table, [named.get(v, str(v)) for v in range(first, last + 1)]


def inputs(paths: Sequence[str | Path]) -> Pairs:
    """Unlabelled pictures of files and folders."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += [p for p in sorted(path.rglob("*")) if p.suffix.lower() in ENDINGS]
        elif path.is_file():
            files.append(path)
        else:
            raise BadInput(str(path), expected="a picture or a folder of them", got="nothing there")
    if not files:
        raise BadInput(", ".join(map(str, paths)), expected="pictures", got="none")
    return Pairs(tuple(map(str, files)), (), None, tuple(map(str, files)))


def is_single(value: Any) -> bool:
    """A dict, a picture, or an array [height, width, channels]."""
    return isinstance(value, (Mapping, Image.Image)) or getattr(value, "ndim", 0) == 3


def from_memory(value: Any, index: int) -> Sample:
    if isinstance(value, Mapping):
        return {"id": f"input {index}", **value}
    if isinstance(value, Image.Image):
        return {"id": f"input {index}", "image": np.asarray(value.convert("RGB"))}
    if hasattr(value, "ndim"):
        return {"id": f"input {index}", "image": array_to_rgb(np.asarray(value))}
    raise BadInput(f"input {index}", expected="a path, a picture, or an array [height, width, channels]", got=type(value).__name__)


def write(prediction: Any, batch: Mapping[str, Any], folder: Path) -> list[Path]:
    from formarium.tasks.semantic_segmentation.draw import palette

    paths = []
    for i, name in enumerate(batch["id"]):
        h, w = (int(v) for v in batch["size"][i])
        image = Image.fromarray(prediction.label[i, :h, :w].cpu().numpy().astype(np.uint8)).convert("P")
        image.putpalette(palette().reshape(-1).tolist())
        paths.append(folder / f"{file_stem(name)}.png")
        image.save(paths[-1])
    return paths
