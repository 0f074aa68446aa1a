"""Reading images that people have: folders of classes, with or without splits; every common format, depth and colour mode.

folder/class/name.jpg                        split by the seed, a fifth of every class held out
folder/train/class/name.jpg, folder/val/...  as given (valid, validation and test are understood too)
"""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from formarium.errors import BadInput
from formarium.task import Data, Sample

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm")
MANY = 256  # files from which on decoding is checked in worker processes


def decode(path: str | Path) -> np.ndarray:
    """An image file as uint8 RGB [height, width, 3], upright.

    Transparency is laid on white, grey repeated, 16-bit values scaled by 65535 and floating-point ones in [0, 1] by 1.
    Raises OSError or ValueError where the file can't be decoded whole.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception:
        if Path(path).suffix.lower() not in (".tif", ".tiff"):
            raise
        import tifffile  # 16-bit colour and other TIFFs that Pillow doesn't take

        return array_to_rgb(tifffile.imread(path))


def to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        return array_to_rgb(np.asarray(image))
    if image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB")).copy()


def array_to_rgb(values: np.ndarray) -> np.ndarray:
    """uint8 RGB from an array [height, width] or [height, width, channels] of any depth."""
    if values.ndim not in (2, 3):
        raise ValueError(f"an image of shape {values.shape}")
    if values.dtype == np.uint8:
        unit = values / 255.0
    elif np.issubdtype(values.dtype, np.floating):
        unit = values
    else:
        unit = values / 65535.0  # 16-bit values, also where they come in 32-bit containers
    if not np.isfinite(unit).all():
        raise ValueError("NaN or infinite pixels")
    unit = unit[..., None] if unit.ndim == 2 else unit
    if unit.shape[2] in (2, 4):
        alpha = unit[..., -1:]
        unit = unit[..., :-1] * alpha + (1 - alpha)
    unit = np.repeat(unit, 3, axis=2) if unit.shape[2] == 1 else unit[..., :3]
    return (unit.clip(0, 1) * 255).round().astype(np.uint8)


@dataclass
class Images:
    """Image files by index, decoded when asked for, so that loader processes do it; kept in memory where they are small.

    A sample holds image (uint8 [height, width, 3]), id (the path below `root`) and, where there are labels, label.
    """

    root: str
    paths: list[str]
    labels: list[int] | None = None
    keep: bool = False
    _kept: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        image = self._kept.get(index)
        if image is None:
            image = decode(self.paths[index])
            if self.keep:
                self._kept[index] = image
        sample: Sample = {"image": image, "id": os.path.relpath(self.paths[index], self.root)}
        if self.labels is not None:
            sample["label"] = self.labels[index]
        return sample


@dataclass
class Arrays:
    """Images in memory: uint8 [samples, height, width, 3], labels, ids."""

    images: np.ndarray
    labels: np.ndarray
    ids: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return {"image": self.images[index], "label": int(self.labels[index]), "id": self.ids[index]}


_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read(path: str | Path, *, strict: bool = False, holdout: float = 0.2, seed: int = 0, keep_pixels: int = 200_000_000) -> Data:
    """The classes and splits of a folder of images.

    strict: fail on the first files that can't be decoded, rather than leave them out and name them in `notes`.
    holdout: the share of every class that becomes "val" where the folder has no split of its own, at least one image.
    keep_pixels: decoded images are kept in memory where all of them together have no more pixels than this.
    Raises BadInput: no such folder, a file, no images, one class only, all corrupt, a class too small to split, or classes that
    only one split has.
    """
    root = Path(path)
    if not root.exists():
        raise BadInput(str(path), expected="a folder of images", got="no such path")
    if not root.is_dir():
        raise BadInput(str(path), expected="a folder with one sub-folder a class", got="a file", fix="give the folder")
    given = {_SPLITS[d.name.lower()]: d for d in _folders(root) if d.name.lower() in _SPLITS}
    if "train" in given and len(given) > 1:
        found = {split: _scan(folder) for split, folder in given.items()}
        ignored: list[str] = []
    else:
        found = {"all": _scan(root)}
        ignored = [p.name for p in sorted(root.iterdir()) if p.is_file() and p.suffix.lower() in FORMATS]
    if not any(files for classes in found.values() for files in classes.values()):
        raise BadInput(str(path), expected=f"images ({', '.join(FORMATS[:6])}, ...) as class/name.jpg", got=_what_is_there(root, ignored))
    notes = [f"{len(ignored)} images outside of class folders left out: {_few(ignored)}"] if ignored else []
    found, pixels, corrupt = _decodable(found, root)
    if corrupt and strict:
        raise BadInput(f"{len(corrupt)} of {path}'s images", expected="files that decode", got=_few(corrupt), fix="or leave out --strict")
    if corrupt:
        notes.append(f"{len(corrupt)} files that can't be decoded left out: {_few(corrupt)}")
    total = sum(len(files) for classes in found.values() for files in classes.values())
    if not total:
        raise BadInput(str(path), expected="images that decode", got=f"{len(corrupt)} corrupt files: {_few(corrupt)}")
    names = sorted({name for classes in found.values() for name, files in classes.items() if files})
    empty = sorted({name for classes in found.values() for name in classes} - {*names})
    if empty:
        notes.append(f"classes without a usable image left out: {_few(empty)}")
    if len(names) < 2:
        raise BadInput(str(path), expected="at least two classes (a sub-folder each)", got=f"one: {names[0]}")
    splits = found if "train" in found else _split(found["all"], names, holdout, seed)
    _must_share_classes(splits, names)
    keep = pixels <= keep_pixels
    datasets: dict[str, Any] = {}
    for split, classes in splits.items():
        paths = [str(p) for name in names for p in classes.get(name, [])]
        labels = [i for i, name in enumerate(names) for _ in classes.get(name, [])]
        datasets[split] = Images(str(root), paths, labels, keep)
    if "val" not in datasets:
        datasets["val"] = datasets["test"]
    return Data(root.name, "image-classification", datasets, {"num_classes": len(names)}, names, notes, {"path": str(root)})


def inputs(paths: Sequence[str | Path]) -> Images:
    """Unlabelled images: files, folders (all images below) and globs. BadInput for what isn't there or isn't an image."""
    found: list[str] = []
    for entry in paths:
        p = Path(entry)
        if p.is_dir():
            inside = [str(f) for f in sorted(p.rglob("*")) if f.suffix.lower() in FORMATS]
            if not inside:
                raise BadInput(str(entry), expected="a folder with images", got="none in it")
            found += inside
        elif p.is_file():
            found.append(str(p))
        elif hits := sorted(glob.glob(str(entry), recursive=True)):
            found += [h for h in hits if Path(h).is_file()]
        else:
            raise BadInput(str(entry), expected="an image, a folder or a glob", got="no such path")
    if not found:
        raise BadInput("images", expected="at least one", got="none")
    bad = [p for p, size in zip(found, _sizes(found), strict=True) if size is None]
    if len(bad) == len(found):
        raise BadInput(_few(bad), expected="an image", got="a file that can't be decoded as one")
    if bad:
        warnings.warn(f"{len(bad)} files that can't be decoded left out: {_few(bad)}", stacklevel=2)
    return Images(os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in found]), [p for p in found if p not in {*bad}])


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents, from transformed samples (image: float32 [3, height, width])."""
    import torch

    batch: dict[str, Any] = {
        "image": torch.from_numpy(np.stack([s["image"] for s in samples])),
        "id": [s["id"] for s in samples],
    }
    if "label" in samples[0]:
        batch["label"] = torch.tensor([s["label"] for s in samples], dtype=torch.int64)
    return batch


# how a folder is understood -----------------------------------------------------------------------------------------


def _folders(root: Path) -> list[Path]:
    return sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))


def _scan(root: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, in order, whatever folders lie below."""
    return {d.name: sorted(f for f in d.rglob("*") if f.suffix.lower() in FORMATS and f.is_file()) for d in _folders(root)}


def _size(path: str) -> int | None:
    """Pixels of a file that decodes, None of one that doesn't."""
    try:
        h, w, _ = decode(path).shape
        return h * w
    except Exception:  # whatever a broken file makes a decoder raise
        return None


def _sizes(paths: Sequence[str]) -> list[int | None]:
    if len(paths) < 16:
        return [_size(p) for p in paths]
    workers = min(8, os.cpu_count() or 1)
    pool: Executor = ProcessPoolExecutor(workers) if len(paths) >= MANY else ThreadPoolExecutor(workers)
    with pool:
        return [*pool.map(_size, paths, **({"chunksize": 32} if len(paths) >= MANY else {}))]


def _decodable(found: Mapping[str, Mapping[str, list[Path]]], root: Path) -> tuple[dict[str, dict[str, list[Path]]], int, list[str]]:
    every = [p for classes in found.values() for files in classes.values() for p in files]
    sizes = dict(zip(every, _sizes([str(p) for p in every]), strict=True))
    good = {
        split: {name: [p for p in files if sizes[p] is not None] for name, files in classes.items()} for split, classes in found.items()
    }
    corrupt = [str(p.relative_to(root)) for p in every if sizes[p] is None]
    return good, sum(size or 0 for size in sizes.values()), corrupt


def _split(classes: Mapping[str, list[Path]], names: Sequence[str], holdout: float, seed: int) -> dict[str, dict[str, list[Path]]]:
    small = [name for name in names if len(classes[name]) < 2]
    if small:
        raise BadInput(f"class {_few(small)}", expected="at least two images, one to train on and one to test on", got="one")
    rng = np.random.default_rng(seed)
    splits: dict[str, dict[str, list[Path]]] = {"train": {}, "val": {}}
    for name in names:
        files = classes[name]
        held = {*rng.permutation(len(files))[: max(1, round(holdout * len(files)))].tolist()}
        splits["train"][name] = [f for i, f in enumerate(files) if i not in held]
        splits["val"][name] = [f for i, f in enumerate(files) if i in held]
    return splits


def _must_share_classes(splits: Mapping[str, Mapping[str, list[Path]]], names: Sequence[str]) -> None:
    for split, classes in splits.items():
        missing = [name for name in names if not classes.get(name)]
        if missing and split == "train":
            raise BadInput(f"{split}/", expected="every class that the other splits have", got=f"none of {_few(missing)}")


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _what_is_there(root: Path, ignored: Sequence[str]) -> str:
    if ignored:
        return f"{len(ignored)} images but no class folders"
    count = sum(1 for p in root.rglob("*") if p.is_file())
    return f"{count} other files" if count else "an empty folder"


def is_single(value: Any) -> bool:
    """Whether a value in memory is one image, rather than several."""
    return isinstance(value, (Mapping, Image.Image)) or (hasattr(value, "dtype") and hasattr(value, "ndim") and value.ndim != 4)


def from_memory(value: Any, index: int) -> Sample:
    """A raw sample of an image in memory (or of a sample as a dict); 8 bits a channel, as files have them."""
    import torch

    name, x = f"input {index}", value
    if isinstance(x, Mapping):
        return {"id": name, **x}
    if isinstance(x, Image.Image):
        x = to_rgb(x)
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().float() if x.is_floating_point() else x.detach().cpu()
        x = (x.movedim(0, -1) if x.ndim == 3 else x).numpy()
    if not isinstance(x, np.ndarray):
        raise BadInput(name, expected="an image, an array or a tensor", got=type(value).__name__)
    if x.ndim == 2:
        x = x[..., None]
    if x.ndim != 3 or x.shape[2] not in (1, 3) or not x.size:
        raise BadInput(name, expected="an image with 1 or 3 channels", got=f"{x.dtype} {[*x.shape]}")
    if np.issubdtype(x.dtype, np.floating):
        if not np.isfinite(x).all() or x.min() < 0 or x.max() > 1:
            raise BadInput(name, expected="values in [0, 1]", got=f"{x.min():.3g} to {x.max():.3g}")
        x = (x * 255).round()
    elif x.dtype == np.uint16:
        x = (x / 257).round()
    elif x.dtype != np.uint8:
        raise BadInput(name, expected="uint8, uint16 or float values", got=str(x.dtype))
    return {"id": name, "image": np.repeat(x, 3 // x.shape[2], axis=2).astype(np.uint8)}
