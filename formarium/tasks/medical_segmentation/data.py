"""Reading and writing NIfTI.

BraTS     folder/CASE/CASE_{t1,t1ce,t2,flair,seg}.nii.gz     four channels; regions TC, WT, ET of the labels 1, 2, 4
MSD       folder/{imagesTr,labelsTr}/NAME.nii.gz, dataset.json with the labels' names
plain     folder/{images,labels}/NAME.nii.gz, or in folder/train/ and folder/val/
unlabelled  any of these in which no case has a mask: volumes for pre-training
An image is a volume [x, y, z], a slice [x, y], or has its channels on the last axis of four.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formarium.errors import BadInput, MissingExtra
from formarium.task import Data, Sample, file_stem
from formarium.tasks.medical_segmentation.model import Rebuilt, is_whole

BRATS_REGIONS = ((1, 4), (1, 2, 4), (4,))
BRATS_NAMES = ("tumour core", "whole tumour", "enhancing tumour")
CHANNELS = (("t1", "t1n"), ("t1ce", "t1gd", "t1c"), ("t2", "t2w"), ("flair", "t2f"))  # of BraTS, in order, by the names they had
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LAYOUTS = (("imagesTr", "labelsTr"), ("images", "labels"), ("image", "label"), ("imgs", "masks"), ("images", "masks"))


@dataclass(frozen=True)
class Case:
    """One patient: image files (one with all channels, or one a channel), the label's file where there is one."""

    id: str
    images: tuple[str, ...]
    label: str | None = None


@dataclass
class Cases:
    """Cases by index, read when asked for: image float32 [channels, *spatial], label int64 [*spatial], affine [4, 4], id."""

    cases: list[Case]

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Sample:
        case = self.cases[index]
        loaded = [load(path) for path in case.images]
        affine = loaded[0][1]
        shapes = {v.shape for v, _ in loaded}
        if len(shapes) > 1:
            raise BadInput(f"the channels of {case.id}", expected="one shape", got=", ".join(str([*s]) for s in sorted(shapes)))
        image = np.stack([v for v, _ in loaded]) if len(loaded) > 1 else as_channels(loaded[0][0])
        sample: Sample = {"image": image, "affine": affine, "id": case.id}
        if case.label is not None:
            label = load(case.label)[0]
            label = label[..., 0] if label.ndim == image.ndim and label.shape[-1] == 1 else label
            if label.shape != image.shape[1:]:
                raise BadInput(f"the mask of {case.id}", expected=f"the image's shape {[*image.shape[1:]]}", got=f"{[*label.shape]}")
            values = np.unique(label)
            if not is_whole(values) or values[0] < 0:
                got = f"values such as {values[0]:g}, {values[-1]:g}"
                raise BadInput(f"the mask of {case.id}", expected="whole numbers from 0 on", got=got)
            sample["label"] = label.astype(np.int64)
        return sample


def nibabel() -> Any:
    try:
        import nibabel as found
    except ImportError:
        raise MissingExtra("nibabel", "medical") from None
    return found


def load(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(float32 values, affine float64 [4, 4]) of a NIfTI file. BadInput where it can't be read or holds NaN or infinite values."""
    nib = nibabel()
    try:
        file = nib.load(str(path))
        values = np.asarray(file.dataobj, dtype=np.float32)
    except Exception as e:  # whatever a broken file makes the reader raise
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"
        raise BadInput(f"{path}", expected="a NIfTI file (.nii, .nii.gz)", got=why) from None
    if not np.isfinite(values).all():
        raise BadInput(f"{path}", expected="finite values", got="NaN or infinite ones")
    if values.ndim not in (2, 3, 4) or not values.size:
        raise BadInput(f"{path}", expected="a slice, a volume, or a volume with channels last", got=f"{[*values.shape]}")
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    return values, np.asarray(file.affine, dtype=np.float64)


def as_channels(values: np.ndarray) -> np.ndarray:
    """A file's array with its channels first: the last of four axes, or one channel."""
    if values.ndim < 4:
        return values[None]
    return np.ascontiguousarray(np.moveaxis(values[:, :, 0] if values.shape[2] == 1 else values, -1, 0))


def read(
    path: str | Path, *, regions: Sequence[Sequence[int]] | None = None, holdout: float = 0.2, seed: int = 0, strict: bool = False,
    masks: bool | None = None,
) -> Data:  # fmt: skip
    """The cases of a folder in one of the layouts above.

    regions: sets of labels that are segmented as overlapping regions; by default the BraTS ones in that layout, none elsewhere (then every
    label is a class). holdout: the share that becomes "val" where the folder has no split. strict: fail on the first case that can't be
    used, rather than leave it out and say so in `notes`. Every case is read once, to check it. masks: False to take every image, whatever
    the folder's layout, without its mask, for pre-training; True to ask for masks; by default they may lack in all cases or in none.
    Raises BadInput: no such folder, a file, no cases, no masks, too few, all broken, channels or dimensions that differ.
    """
    nibabel()
    root = Path(path)
    if not root.exists():
        raise BadInput(str(path), expected="a folder of NIfTI files", got="no such path")
    if not root.is_dir():
        raise BadInput(str(path), expected="a folder of NIfTI files", got="a file", fix="give the folder")
    given = {SPLITS[d.name.lower()]: d for d in sorted(root.iterdir()) if d.is_dir() and d.name.lower() in SPLITS}
    found = {s: _scan(d) for s, d in given.items()} if "train" in given and len(given) > 1 else {"all": _scan(root)}
    if masks is False:
        found = {s: [Case(c.id, c.images) for c in cases] for s, cases in found.items()}
        if not any(found.values()):
            found = {"all": [Case(_stem(f), (str(f),)) for f in _files(root)]}
    every = [c for cases in found.values() for c in cases]
    if not every:
        count = len(_files(root))
        got = f"{count} NIfTI files, in another order" if count else "no NIfTI file"
        raise BadInput(str(path), expected="CASE/CASE_{t1,t1ce,t2,flair,seg}.nii.gz, or images/ and labels/", got=got)
    labelled = masks is True or any(c.label is not None for c in every)
    looked, broken = {}, {}
    for case in every:
        try:
            if labelled and case.label is None:
                raise BadInput(case.id, expected="a mask", got="none")
            sample = Cases([case])[0]
            values = {*np.unique(sample["label"]).tolist()} if labelled else set()
            looked[case] = sample["image"].shape[0], sample["image"].ndim - 1, values
        except BadInput as e:
            if strict:
                raise
            broken[case] = str(e)
    if not looked:
        raise BadInput(str(path), expected="cases that can be read", got="; ".join([*broken.values()][:2]))
    for what, place in (("channels", 0), ("spatial dimensions", 1)):
        seen = sorted({v[place] for v in looked.values()})
        if len(seen) > 1:
            raise BadInput(str(path), expected=f"one number of {what}", got=" and ".join(map(str, seen)))
    channels, dims, _ = next(iter(looked.values()))
    brats = all(len(c.images) == len(CHANNELS) for c in looked)
    chosen = tuple(map(tuple, regions if regions is not None else BRATS_REGIONS if brats else ()))
    labels = set().union(*(v[2] for v in looked.values()))
    args, names = _targets(root, labels, chosen, brats and regions is None) if labelled else ({}, [])
    splits = {s: [c for c in cases if c in looked] for s, cases in found.items()}
    if "all" in splits:
        splits = _split(splits["all"], holdout, seed)
    if "val" not in splits:
        splits["val"] = splits["test"]
    notes = [f"{len(broken)} cases left out: {'; '.join([*broken.values()][:3])}"] if broken else []
    model_args = {"in_channels": channels, "spatial_dims": dims, **args}
    datasets: dict[str, Any] = {s: Cases(cases) for s, cases in splits.items()}
    return Data(root.name, "medical-segmentation", datasets, model_args, names, notes, {"path": str(root)})


def without_masks(data: Data) -> Data:
    """The same volumes for pre-training: no labels, and nothing said of what they would be."""
    splits: dict[str, Any] = {name: Unlabelled(cases) for name, cases in data.splits.items()}
    kept = {k: v for k, v in data.model_args.items() if k in ("in_channels", "spatial_dims")}
    return Data(data.name, data.task, splits, kept, [], [*data.notes], {**data.source})


@dataclass
class Unlabelled:
    """The samples of a split without their labels."""

    cases: Any

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Sample:
        return {k: v for k, v in self.cases[index].items() if k != "label"}


def _targets(root: Path, labels: set[int], regions: tuple[tuple[int, ...], ...], brats: bool) -> tuple[dict[str, Any], list[str]]:
    """What the network must give out, and the masks' names."""
    if regions:
        strange = labels - {0, *(v for r in regions for v in r)}
        if strange:
            raise BadInput(f"{root}", expected=f"labels of the regions {[list(r) for r in regions]}", got=f"{sorted(strange)}")
        names = BRATS_NAMES if brats else [f"labels {' '.join(map(str, r))}" for r in regions]
        return {"out_channels": len(regions), "regions": regions}, [*names]
    classes = max(labels) + 1
    named: dict[int, str] = {}
    if (root / "dataset.json").is_file():
        said = json.loads((root / "dataset.json").read_text(encoding="utf-8")).get("labels", {})
        named = {int(k): str(v) for k, v in said.items() if str(k).isdigit()} or {int(v): str(k) for k, v in said.items()}
        classes = max([classes, *(k + 1 for k in named)])
    if classes < 2:
        raise BadInput(f"{root}", expected="masks with something in them", got="only zeros")
    if classes > 256:
        raise BadInput(f"{root}", expected="labels below 256", got=f"up to {classes - 1}")
    return {"out_channels": classes, "regions": ()}, [named.get(i, f"label {i}") for i in range(1, classes)]


def _scan(root: Path) -> list[Case]:
    for images, labels in LAYOUTS:
        if (root / images).is_dir():
            masks = {_stem(f): f for f in _files(root / labels)} if (root / labels).is_dir() else {}
            return [Case(_stem(f), (str(f),), str(masks[_stem(f)]) if _stem(f) in masks else None) for f in _files(root / images)]
    return [case for d in sorted(p for p in root.iterdir() if p.is_dir()) if (case := _brats(d)) is not None]


def _brats(folder: Path) -> Case | None:
    """The case in a folder with one file a channel, by how their names end."""
    ends = {re.split(r"[_-]", _stem(f).lower())[-1]: str(f) for f in _files(folder)}
    channels = [next((ends[n] for n in names if n in ends), None) for names in CHANNELS]
    if any(c is None for c in channels):
        return None
    return Case(folder.name, tuple(c for c in channels if c), ends.get("seg"))


def _files(root: Path) -> list[Path]:
    return sorted(f for f in root.rglob("*") if f.is_file() and f.name.endswith((".nii", ".nii.gz")) and not f.name.startswith("."))


def _stem(path: Path) -> str:
    return re.sub(r"(_0000)?\.nii(\.gz)?$", "", path.name)


def _split(cases: list[Case], holdout: float, seed: int) -> dict[str, list[Case]]:
    if len(cases) < 2:
        raise BadInput("cases", expected="at least two, one to train on and one to test on", got="one")
    held = {*np.random.default_rng(seed).permutation(len(cases))[: max(1, round(holdout * len(cases)))].tolist()}
    return {"train": [c for i, c in enumerate(cases) if i not in held], "val": [c for i, c in enumerate(cases) if i in held]}


def inputs(paths: Sequence[str | Path]) -> Cases:
    """Cases to segment: NIfTI files, folders of them, folders of cases with one file a channel, globs. BadInput for what isn't there."""
    nibabel()
    cases: list[Case] = []
    for entry in paths:
        p = Path(entry)
        hits = [p] if p.exists() else [Path(h) for h in sorted(glob.glob(str(entry), recursive=True))]
        if not hits:
            raise BadInput(str(entry), expected="a NIfTI file, a folder or a glob", got="no such path")
        for hit in hits:
            if hit.is_file():
                cases.append(Case(_stem(hit), (str(hit),)))
            elif (case := _brats(hit)) is not None:
                cases.append(Case(case.id, case.images))
            else:
                inside = _scan(hit) or [Case(_stem(f), (str(f),)) for f in _files(hit)]
                cases += [Case(c.id, c.images) for c in inside]
    if not cases:
        raise BadInput(", ".join(map(str, paths)), expected="NIfTI files", got="none")
    return Cases(cases)


def from_memory(value: Any, index: int) -> Sample:
    """A raw sample of an array or tensor [channels, *spatial], or of a sample as a dict."""
    import torch

    name = f"input {index}"
    given = value if isinstance(value, Mapping) else {"image": value}
    x = given.get("image")
    x = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else x
    if not isinstance(x, np.ndarray) or x.ndim not in (3, 4) or not x.size:
        got = f"{x.dtype} {[*x.shape]}" if isinstance(x, np.ndarray) else type(x).__name__
        raise BadInput(name, expected="an array [channels, depth, height, width] or [channels, height, width]", got=got)
    if not np.isfinite(x).all():
        raise BadInput(name, expected="finite values", got="NaN or infinite ones")
    return {"id": name, **given, "image": x.astype(np.float32)}


def write(prediction: Any, batch: Mapping[str, Any], folder: Path) -> list[Path]:
    nib, paths = nibabel(), []
    if isinstance(prediction, Rebuilt):
        raise BadInput("prediction", expected="masks", got="an encoder in pre-training", fix="fit it on volumes with masks first")
    for i, label in enumerate(prediction.label):
        affine = batch["affine"][i].cpu().numpy() if "affine" in batch else np.eye(4)
        paths.append(folder / f"{file_stem(batch['id'][i])}.nii.gz")
        nib.save(nib.Nifti1Image(label.cpu().numpy().astype(np.uint8), affine), str(paths[-1]))
    return paths
