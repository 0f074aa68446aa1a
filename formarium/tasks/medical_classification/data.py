"""Reading medical images that people have: folders of classes, with or without splits, 2D images and 3D volumes side by side.

folder/class/name.EXT                        split by the seed, a fifth of every class (and rank) held out
folder/train/class/name.EXT, folder/val/...  as given (valid, validation and test are understood too)

images   .png .jpg .jpeg .bmp .webp .tif .tiff (one page) .dcm (one frame) .npy .npz ([h, w] or [h, w, 3])
volumes  .nii .nii.gz .tif .tiff (several pages) .dcm (several frames) .npy .npz ([h, w, slices])
"""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from formarium.errors import BadInput, MissingExtra
from formarium.task import Data, Sample
from formarium.tasks.image_classification.data import array_to_rgb, decode, to_rgb
from formarium.tasks.medical_classification.model import RANKS

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = (*PICTURES, ".tif", ".tiff", ".dcm", ".nii", ".nii.gz", ".npy", ".npz")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


# one file -----------------------------------------------------------------------------------------------------------


def ending(path: str | Path) -> str:
    name = Path(path).name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def load(path: str | Path) -> Sample:
    """{"image": uint8 RGB [h, w, 3]} or {"volume": [h, w, slices], uint8 or float32} of one file.

    Raises BadInput, naming the file, where it can't be read; MissingExtra where its format needs a package that isn't there.
    """
    kind = ending(path)
    readers = {".dcm": _dicom, ".nii": _nifti, ".nii.gz": _nifti, ".npy": _numpy, ".npz": _numpy, ".tif": _tiff, ".tiff": _tiff}
    try:
        values = readers.get(kind, decode)(path)
        sample = of_array(values, str(path))
    except (BadInput, MissingExtra):
        raise
    except Exception as e:  # whatever a broken file makes a reader raise
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"
        raise BadInput(f"{path}", expected=f"a readable {kind} file", got=why) from None
    return sample


def of_array(values: np.ndarray, name: str) -> Sample:
    """An array by its shape: [h, w] and [h, w, 3 or 4] are images, [h, w, slices] is a volume (one slice: an image)."""
    if values.dtype == object or not (np.issubdtype(values.dtype, np.number) or values.dtype == bool) or np.iscomplexobj(values):
        raise BadInput(name, expected="real numbers", got=str(values.dtype))
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or not values.size:
        raise BadInput(name, expected="an image [h, w], [h, w, 3] or a volume [h, w, slices]", got=f"shape {[*values.shape]}")
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        raise BadInput(name, expected="finite values", got="NaN or infinite ones")
    if values.ndim == 3 and values.shape[2] > 4:
        return {"volume": values if values.dtype == np.uint8 else values.astype(np.float32)}
    if values.ndim == 3 and values.shape[2] == 2:
        raise BadInput(name, expected="1, 3 or 4 channels, or at least 5 slices", got=f"shape {[*values.shape]}")
    if values.dtype in (np.uint8, np.uint16):
        return {"image": array_to_rgb(values)}
    low, high = float(values.min()), float(values.max())
    inside = np.issubdtype(values.dtype, np.floating) and low >= 0 and high <= 1
    scaled = values if inside else (values.astype(np.float64) - low) / max(high - low, 1e-12)  # Hounsfield units and the like
    return {"image": array_to_rgb(scaled.astype(np.float32))}


def _tiff(path: str | Path) -> np.ndarray:
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            pages = len(file.pages)
            values = file.asarray()
    except Exception:
        return decode(path)  # compressions that tifffile leaves to packages, Pillow takes
    if pages == 1 and values.ndim != 3:
        return decode(path)
    if values.ndim == 3 and values.shape[2] not in (3, 4):
        return np.moveaxis(values, 0, -1)  # pages last
    if values.ndim == 4:
        return np.moveaxis(np.stack([array_to_rgb(page)[..., 0] for page in values]), 0, -1)  # pages in RGB: grey
    return decode(path) if pages == 1 else values


def _numpy(path: str | Path) -> np.ndarray:
    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return found
    with found:
        names = found.files
        chosen = next((n for n in ("image", "volume", "data", "arr_0") if n in names), names[0] if len(names) == 1 else None)
        if chosen is None:
            raise BadInput(f"{path}", expected="one array, or one called image, volume or data", got=", ".join(names[:6]) or "none")
        return found[chosen]


def _nifti(path: str | Path) -> np.ndarray:
    try:
        import nibabel
    except ImportError:
        raise MissingExtra("nibabel", "medical") from None
    file: Any = nibabel.load(str(path))
    values = np.asarray(file.dataobj)
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    return values


def _dicom(path: str | Path) -> np.ndarray:
    try:
        import pydicom
    except ImportError:
        raise MissingExtra("pydicom", "medical") from None
    file = pydicom.dcmread(path)
    values = np.asarray(file.pixel_array)
    if getattr(file, "PhotometricInterpretation", "") == "MONOCHROME1":  # white is the lowest value
        values = values.max() - values
    return np.moveaxis(values, 0, -1) if values.ndim == 3 and values.shape[2] not in (3, 4) else values


# data sets ----------------------------------------------------------------------------------------------------------


@dataclass
class Files:
    """Image and volume files by index, read when asked for; kept in memory where they are small. `ranks`: 2 or 3, of each."""

    root: str
    paths: list[str]
    ranks: list[int]
    labels: list[int] | None = None
    keep: bool = False
    _kept: dict[int, Sample] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        sample = self._kept.get(index)
        if sample is None:
            sample = load(self.paths[index])
            if self.keep:
                self._kept[index] = sample
        sample = {**sample, "id": os.path.relpath(self.paths[index], self.root)}
        return sample if self.labels is None else {**sample, "label": self.labels[index]}


@dataclass
class Arrays:
    """Samples in memory: each uint8 [h, w, 3] (an image) or float32 [h, w, d] (a volume), as `ranks` says."""

    values: list[np.ndarray]
    ranks: list[int]
    labels: np.ndarray
    ids: list[str]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Sample:
        key = "image" if self.ranks[index] == 2 else "volume"
        return {key: self.values[index], "label": int(self.labels[index]), "id": self.ids[index]}


@dataclass
class Some:
    """Some samples of a data set, by their places in it."""

    whole: Any
    at: list[int]

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, index: int) -> Sample:
        return self.whole[self.at[index]]

    @property
    def ranks(self) -> list[int]:
        return [self.whole.ranks[i] for i in self.at]


def of_rank(data: Data, rank: int) -> Data:
    """The images (2) or the volumes (3) alone, for whatever wants batches of one rank. BadInput where a split has none."""
    if rank not in RANKS:
        raise BadInput("rank", expected="2 or 3", got=str(rank))
    splits = {}
    for split, dataset in data.splits.items():
        splits[split] = Some(dataset, [i for i, r in enumerate(dataset.ranks) if r == rank])  # type: ignore[attr-defined]
        if not len(splits[split]):
            raise BadInput(f"{split} of {data.name}", expected=RANKS[rank], got="none")
    return replace(data, name=f"{data.name} ({RANKS[rank]})", splits=splits)


def read(path: str | Path, *, strict: bool = False, holdout: float = 0.2, seed: int = 0, keep_values: int = 200_000_000) -> Data:
    """The classes and splits of a folder; every file is read once, to see its rank and whether it is whole.

    strict: fail on files that can't be read, rather than leave them out and name them in `notes`. holdout: the share of every class and
    rank that becomes "val" where the folder has no split of its own. keep_values: all is kept in memory where it holds no more than this.
    Raises BadInput: no such folder, a file, nothing to read, one class only, all corrupt, a class too small to split, a class that the
    training split hasn't. MissingExtra where every file needs a package that isn't there.
    """
    root = Path(path)
    if not root.exists():
        raise BadInput(str(path), expected="a folder of medical images", got="no such path")
    if not root.is_dir():
        raise BadInput(str(path), expected="a folder with one sub-folder a class", got="a file", fix="give the folder")
    given = {_SPLITS[d.name.lower()]: d for d in _folders(root) if d.name.lower() in _SPLITS}
    found = {split: _scan(folder) for split, folder in given.items()} if "train" in given and len(given) > 1 else {"all": _scan(root)}
    stray = [] if "train" in found else sorted(p.name for p in root.iterdir() if p.is_file() and ending(p) in FORMATS)
    if not any(files for classes in found.values() for files in classes.values()):
        others = sum(1 for p in root.rglob("*") if p.is_file())
        got = f"{len(stray)} images but no class folders" if stray else f"{others} other files" if others else "an empty folder"
        raise BadInput(str(path), expected="class/name.EXT (.png, .jpg, .tif, .dcm, .nii.gz, .npy)", got=got)
    notes = [f"{len(stray)} files outside of class folders left out: {_few(stray)}"] if stray else []
    every = [p for classes in found.values() for files in classes.values() for p in files]
    seen = dict(zip(every, _look(every), strict=True))
    bad = {p: s for p, s in seen.items() if isinstance(s, Exception)}
    missing = [s for s in bad.values() if isinstance(s, MissingExtra)]
    if missing and len(bad) == len(every):
        raise missing[0]
    few = _few([str(p.relative_to(root)) for p in bad])
    if bad and strict:
        raise BadInput(f"{len(bad)} of {path}'s files", expected="files that can be read", got=few, fix="or leave out --strict")
    if len(bad) == len(every):
        raise BadInput(str(path), expected="files that can be read", got=f"{len(bad)} corrupt ones: {few}")
    if missing:
        notes.append(str(missing[0]))
    if bad:
        notes.append(f"{len(bad)} files that can't be read left out: {few}")
    good = {split: {n: [p for p in files if p not in bad] for n, files in classes.items()} for split, classes in found.items()}
    names = sorted({name for classes in good.values() for name, files in classes.items() if files})
    if len(names) < 2:
        raise BadInput(str(path), expected="at least two classes (a sub-folder each)", got=f"one: {names[0]}")
    rank = {p: s[0] for p, s in seen.items() if not isinstance(s, Exception)}
    splits = good if "train" in good else _split(good["all"], names, rank, holdout, seed)
    absent = [name for name in names if not splits["train"].get(name)]
    if absent:
        raise BadInput("train/", expected="every class that the other splits have", got=f"none of {_few(absent)}")
    counts = {r: sum(1 for v in rank.values() if v == r) for r in RANKS}
    if all(counts.values()):
        notes.append(f"{counts[2]} images and {counts[3]} volumes: batches hold one rank each, or are worked through rank by rank")
    keep = sum(s[1] for s in seen.values() if not isinstance(s, Exception)) <= keep_values
    datasets: dict[str, Any] = {}
    for split, classes in splits.items():
        paths = [p for name in names for p in classes.get(name, [])]
        labels = [i for i, name in enumerate(names) for _ in classes.get(name, [])]
        datasets[split] = Files(str(root), [str(p) for p in paths], [rank[p] for p in paths], labels, keep)
    datasets.setdefault("val", datasets.get("test"))
    return Data(root.name, "medical-classification", datasets, {"num_classes": len(names)}, names, notes, {"path": str(root)})


def inputs(paths: Sequence[str | Path]) -> Files:
    """Unlabelled images and volumes: files, folders (all below) and globs. BadInput for what isn't there or can't be read."""
    found: list[str] = []
    for entry in paths:
        p = Path(entry)
        if p.is_dir():
            inside = [str(f) for f in sorted(p.rglob("*")) if f.is_file() and ending(f) in FORMATS]
            if not inside:
                raise BadInput(str(entry), expected="a folder with images or volumes", got="none in it")
            found += inside
        elif p.is_file():
            found.append(str(p))
        elif hits := sorted(h for h in glob.glob(str(entry), recursive=True) if Path(h).is_file()):
            found += hits
        else:
            raise BadInput(str(entry), expected="an image, a volume, a folder or a glob", got="no such path")
    if not found:
        raise BadInput("images", expected="at least one", got="none")
    seen = dict(zip(found, _look([Path(p) for p in found]), strict=True))
    bad = {p: s for p, s in seen.items() if isinstance(s, Exception)}
    if len(bad) == len(seen):
        raise next(iter(bad.values()))
    if bad:
        warnings.warn(f"{len(bad)} files that can't be read left out: {_few([*bad])}", stacklevel=2)
    good = [p for p in found if p not in bad]
    root = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in found])
    return Files(root, good, [seen[p][0] for p in good])  # type: ignore[index]


def is_single(value: Any) -> bool:
    """Whether a value in memory is one image or volume, rather than several."""
    return isinstance(value, (Mapping, Image.Image)) or (hasattr(value, "dtype") and hasattr(value, "ndim"))


def from_memory(value: Any, index: int) -> Sample:
    """A raw sample of an image or volume in memory: a picture, an array [h, w], [h, w, 3] or [h, w, slices], a tensor [3, h, w] (an image)
    or [1, h, w, slices] (a volume), or a sample as a dict."""
    import torch

    name = f"input {index}"
    if isinstance(value, Mapping):
        return {"id": name, **value}
    if isinstance(value, Image.Image):
        return {"id": name, "image": to_rgb(value)}
    if isinstance(value, torch.Tensor):
        x = value.detach().cpu()
        x = x[0] if x.ndim == 4 and x.shape[0] == 1 else x.movedim(0, -1) if x.ndim == 3 and x.shape[0] in (1, 3) else x
        value = (x.float() if x.is_floating_point() else x).numpy()
    if not isinstance(value, np.ndarray):
        raise BadInput(name, expected="an image, a volume, an array or a tensor", got=type(value).__name__)
    return {"id": name, **of_array(value, name)}


# how a folder is understood -----------------------------------------------------------------------------------------


def _folders(root: Path) -> list[Path]:
    return sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))


def _scan(root: Path) -> dict[str, list[Path]]:
    return {d.name: sorted(f for f in d.rglob("*") if f.is_file() and ending(f) in FORMATS) for d in _folders(root)}


def _look(paths: Sequence[Path]) -> list[Any]:
    """(rank, number of values) of each file, or the error that reading it raises."""

    def one(path: Path) -> Any:
        try:
            sample = load(path)
        except (BadInput, MissingExtra) as e:
            return e
        return (2, sample["image"].size) if "image" in sample else (3, sample["volume"].size)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [*pool.map(one, paths)]


def _split(classes: Mapping[str, list[Path]], names: Sequence[str], rank: Mapping[Path, int], holdout: float, seed: int) -> Any:
    small = [name for name in names if len(classes[name]) < 2]
    if small:
        raise BadInput(f"class {_few(small)}", expected="at least two files, one to train on and one to test on", got="one")
    rng = np.random.default_rng(seed)
    splits: dict[str, dict[str, list[Path]]] = {"train": {}, "val": {}}
    for name in names:
        held: set[Path] = set()
        for r in RANKS:
            files = [p for p in classes[name] if rank[p] == r]
            count = max(1, round(holdout * len(files))) if len(files) > 1 else 0
            held |= {files[i] for i in rng.permutation(len(files))[:count]}
        held = held or {classes[name][-1]}  # one file of each rank: one of them is held out
        splits["train"][name] = [p for p in classes[name] if p not in held]
        splits["val"][name] = [p for p in classes[name] if p in held]
    return splits


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
