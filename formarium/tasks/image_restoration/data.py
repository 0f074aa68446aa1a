"""Reading images to restore: clean ones, which the recipe degrades, or pairs.

folder/name.png                                       clean images, a fifth held out by the seed
folder/train/name.png, folder/val/name.png            clean images, as given
folder/HR/name.png, folder/LR/name.png                pairs by name (LR names may end in x2, x3, x4); GT, LQ and other names: see NAMES
folder/train/HR/..., folder/train/LR/..., ...         pairs, as given
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from formarium.errors import BadInput
from formarium.task import Data, Sample, file_stem
from formarium.tasks.image_classification import data as images
from formarium.tasks.image_restoration.degrade import SHRINKING

NAMES = {
    **dict.fromkeys(("hr", "gt", "target", "targets", "clean", "sharp", "original"), "target"),
    **dict.fromkeys(("lr", "lq", "input", "inputs", "image", "degraded", "noisy", "compressed", "blur", "low"), "image"),
}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
CHECKED = 256  # images up to which all are decoded before anything else; beyond, only their headers are read

from_memory, is_single = images.from_memory, images.is_single


@dataclass
class Photos:
    """Image files by index: target (clean), image (degraded) where there are pairs, id; degrade, where the reader was told how."""

    root: str
    targets: list[str]
    images: list[str] | None = None
    degrade: dict[str, Any] | None = None
    keep: bool = False
    _kept: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        path = self.targets[index]
        sample: Sample = {"target": self._decoded(path), "id": str(Path(path).relative_to(self.root))}
        if self.images is not None:
            sample["image"] = self._decoded(self.images[index])
        if self.degrade is not None:
            sample["degrade"] = self.degrade
        return sample

    def _decoded(self, path: str) -> np.ndarray:
        if path not in self._kept:
            decoded = images.decode(path)
            if not self.keep:
                return decoded
            self._kept[path] = decoded
        return self._kept[path]


@dataclass
class Arrays:
    """Samples in memory."""

    samples: list[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


@dataclass
class Inputs:
    """Degraded images to restore."""

    files: images.Images

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        sample = self.files[index]
        return {"image": sample["image"], "id": sample["id"]}


def read(
    path: str | Path,
    *,
    scale: int | None = None,
    degradation: str | None = None,
    sigma: float = 25,
    quality: int = 10,
    strict: bool = False,
    holdout: float = 0.2,
    seed: int = 0,
    keep_pixels: int = 200_000_000,
) -> Data:
    """The splits of a folder of clean images or pairs.

    scale, degradation, sigma, quality: how clean images are degraded; where neither of the first two is given, as the model's card says.
    strict: fail on the first files that can't be decoded, rather than leave them out and name them in `notes`. holdout: the share that
    becomes "val" where the folder has no split, at least one image. Pairs must all have one whole-number ratio, which the model must have.
    Raises BadInput: no such folder, a file, no images, too few, all corrupt, clean images without a partner, ratios that differ.
    """
    root = Path(path)
    if not root.exists():
        raise BadInput(str(path), expected="a folder of images", got="no such path")
    if not root.is_dir():
        raise BadInput(str(path), expected="a folder of images", got="a file", fix="give the folder")
    given = {SPLITS[d.name.lower()]: d for d in sorted(root.iterdir()) if d.is_dir() and d.name.lower() in SPLITS}
    found = {split: _scan(folder) for split, folder in given.items()} if len(given) > 1 and "train" in given else {"all": _scan(root)}
    if not any(targets for targets, _ in found.values()):
        raise BadInput(str(path), expected=f"images ({', '.join(images.FORMATS[:6])}, ...)", got="none in it")
    found, sizes, notes = _decodable(found, root, strict)
    ratios = {r for targets, degraded in found.values() for r in _ratios(targets, degraded, sizes)}
    if len(ratios) > 1:
        raise BadInput(str(path), expected="pairs of one ratio", got=f"ratios {', '.join(map(str, sorted(ratios)))}")
    if "all" in found:
        found = _split(*found["all"], holdout, seed)
    how = None
    if (scale is not None or degradation is not None) and not ratios:
        kind = degradation or "bicubic"
        how = {"degradation": kind, "upscale": (scale or 4) if kind in SHRINKING else 1, "sigma": sigma, "quality": quality}
    upscale = ratios.pop() if ratios else how["upscale"] if how else None
    keep = sum(h * w for h, w in sizes.values()) <= keep_pixels
    datasets = {
        split: Photos(str(root), [str(t) for t in targets], [str(d) for d in degraded] if degraded else None, how, keep)
        for split, (targets, degraded) in found.items()
    }
    if "val" not in datasets:
        datasets["val"] = datasets["test"]
    args = {} if upscale is None else {"upscale": upscale}
    return Data(root.name, "image-restoration", {**datasets}, args, [], notes, {"path": str(root)})


def inputs(paths: Sequence[str | Path]) -> Inputs:
    """Degraded images: files, folders (all images below) and globs. BadInput for what isn't there or isn't an image."""
    return Inputs(images.inputs(paths))


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents, from transformed samples of one shape. BadInput where the channels differ."""
    import torch

    batch: dict[str, Any] = {"id": [s["id"] for s in samples], "upscale": torch.tensor([s["upscale"] for s in samples])}
    for key in ("image", "target"):
        if key in samples[0]:
            batch[key] = torch.from_numpy(np.stack([s[key] for s in samples]))
    return batch


def write(prediction: Any, batch: Mapping[str, Any], folder: Path) -> list[Path]:
    paths = []
    for i, image in enumerate(prediction.image):
        values = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        paths.append(folder / f"{file_stem(batch['id'][i])}.png")
        Image.fromarray(values[..., 0] if values.shape[2] == 1 else values).save(paths[-1])
    return paths


# how a folder is understood -----------------------------------------------------------------------------------------

Pairs = tuple[list[Path], list[Path]]  # clean images, and degraded ones in the same order (or none)


def _scan(root: Path) -> Pairs:
    roles = {NAMES[d.name.lower()]: d for d in sorted(root.iterdir()) if d.is_dir() and d.name.lower() in NAMES}
    if "target" not in roles:
        return _files(root), []
    targets = _files(roles["target"])
    if "image" not in roles:
        return targets, []
    degraded = {_stem(f, roles["image"]): f for f in _files(roles["image"])}
    alone = [str(t.relative_to(root)) for t in targets if _stem(t, roles["target"]) not in degraded]
    if alone:
        raise BadInput(f"{len(alone)} of {root}'s clean images", expected="a degraded image of the same name for each", got=_few(alone))
    return targets, [degraded[_stem(t, roles["target"])] for t in targets]


def _stem(path: Path, root: Path) -> str:
    return re.sub(r"[_-]?x\d+$", "", str(path.relative_to(root).with_suffix("")), flags=re.IGNORECASE)


def _files(root: Path) -> list[Path]:
    return sorted(f for f in root.rglob("*") if f.suffix.lower() in images.FORMATS and f.is_file())


def _decodable(found: Mapping[str, Pairs], root: Path, strict: bool) -> tuple[dict[str, Pairs], dict[Path, tuple[int, int]], list[str]]:
    every = [f for pair in found.values() for files in pair for f in files]
    look = _decoded_size if len(every) <= CHECKED else _header_size
    with ThreadPoolExecutor(4) as pool:
        sizes = dict(zip(every, pool.map(look, every), strict=True))
    corrupt = [str(f.relative_to(root)) for f in every if sizes[f] is None]
    if corrupt and strict:
        raise BadInput(f"{len(corrupt)} of {root}'s images", expected="files that decode", got=_few(corrupt), fix="or leave out --strict")
    good: dict[str, Pairs] = {}
    for split, (targets, degraded) in found.items():
        kept = [i for i, t in enumerate(targets) if sizes[t] and (not degraded or sizes[degraded[i]])]
        good[split] = [targets[i] for i in kept], [degraded[i] for i in kept] if degraded else []
        if not kept:
            where = f"{root}/{split}" if split != "all" else str(root)
            raise BadInput(
                where, expected="images that decode", got=f"{len(corrupt)} corrupt files: {_few(corrupt)}" if corrupt else "none"
            )
    notes = [f"{len(corrupt)} files that can't be decoded left out: {_few(corrupt)}"] if corrupt else []
    return good, {f: s for f, s in sizes.items() if s}, notes


def _decoded_size(path: Path) -> tuple[int, int] | None:
    try:
        return images.decode(path).shape[:2]  # type: ignore[return-value]
    except Exception:  # whatever a broken file makes a decoder raise
        return None


def _header_size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:
        return _decoded_size(path)


def _ratios(targets: list[Path], degraded: list[Path], sizes: Mapping[Path, tuple[int, int]]) -> set[int]:
    ratios = set()
    for t, d in zip(targets, degraded, strict=False):
        (h, w), (small_h, small_w) = sizes[t], sizes[d]
        ratio = h // small_h
        if ratio < 1 or (small_h * ratio, small_w * ratio) != (h, w):
            raise BadInput(
                f"the pair {t.name}", expected="a clean image a whole number of times as large", got=f"{w}x{h} and {small_w}x{small_h}"
            )
        ratios.add(ratio)
    return ratios


def _split(targets: list[Path], degraded: list[Path], holdout: float, seed: int) -> dict[str, Pairs]:
    if len(targets) < 2:
        raise BadInput("images", expected="at least two, one to train on and one to test on", got="one")
    held = {*np.random.default_rng(seed).permutation(len(targets))[: max(1, round(holdout * len(targets)))].tolist()}

    def chosen(files: list[Path], which: bool) -> list[Path]:
        return [f for i, f in enumerate(files) if (i in held) == which]

    return {s: (chosen(targets, w), chosen(degraded, w)) for s, w in (("train", False), ("val", True))}


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
