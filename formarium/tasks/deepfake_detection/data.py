"""Reading videos of faces that people have.

folder/real/..., folder/fake/...           split by the seed, a fifth of either held out; other spellings are understood: those of
                                           FaceForensics++ (original_sequences, manipulated_sequences) and Celeb-DF (Celeb-real, ...)
folder/train/real/..., folder/val/fake/... as given (valid, validation and test are understood too)
folder/metadata.json                       the Deepfake Detection Challenge's: {"name.mp4": {"label": "FAKE", "split": "train"}, ...}

A video is a film (.mp4, .avi, .mov, .mkv, .webm, .mpg), a folder of frames, or a single picture. Frames should be crops of the face.
"""

from __future__ import annotations

import glob
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from formarium.errors import BadInput, MissingExtra
from formarium.task import Data, Sample
from formarium.tasks.deepfake_detection.model import FAKE, NAMES, REAL
from formarium.tasks.image_classification.data import FORMATS, decode, to_rgb

FILMS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v")
FRAMES = 15  # frames looked at in a video
_CLASSES = {
    **dict.fromkeys(("fake", "fakes", "manipulated", "manipulated_sequences", "celeb-synthesis", "1_fake"), FAKE),
    **dict.fromkeys(("real", "reals", "original", "original_sequences", "celeb-real", "youtube-real", "0_real"), REAL),
}
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


# one video ----------------------------------------------------------------------------------------------------------


def evenly(total: int, frames: int) -> np.ndarray:
    """int64 [frames]: places from the first frame to the last, equally far apart; short videos give a frame more than once."""
    return np.linspace(0, total - 1, frames).astype(np.int64)


def frames_of(path: str | Path, frames: int = FRAMES) -> np.ndarray:
    """Frames of a video, spread evenly over it: uint8 [frames, height, width, 3].

    Raises BadInput where it can't be decoded, has no frames, or frames of several sizes; MissingExtra where PyAV is needed and not there.
    """
    path = Path(path)
    try:
        if path.is_dir():
            pictures = _pictures(path)
            if not pictures:
                raise BadInput(str(path), expected="a folder of frames", got="no pictures in it")
            found = [decode(pictures[i]) for i in evenly(len(pictures), frames)]
        elif path.suffix.lower() in FILMS:
            found = _film(path, frames)
        else:
            found = [decode(path)] * frames
    except (BadInput, MissingExtra):
        raise
    except Exception as e:  # decoders raise all sorts of things
        said = str(e).splitlines()[0] if str(e) else ""
        raise BadInput(str(path), expected="a video that decodes", got=f"{type(e).__name__}: {said}") from None
    sizes = {f.shape for f in found}
    if len(sizes) > 1:
        raise BadInput(str(path), expected="frames of one size", got=", ".join(sorted(f"{s[1]}x{s[0]}" for s in sizes)))
    return np.stack(found)


def _film(path: Path, frames: int) -> list[np.ndarray]:
    av = _av()
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise BadInput(str(path), expected="a video", got="a file without a video stream")
        total = container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))
    if not total:
        raise BadInput(str(path), expected="a video", got="no frames")
    wanted, kept, last = {*evenly(total, frames).tolist()}, {}, None
    with av.open(str(path)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            last = frame
            if i in wanted:
                kept[i] = frame.to_ndarray(format="rgb24")
            if i >= total - 1:
                break
    if last is None:
        raise BadInput(str(path), expected="a video", got="no frames")
    end = last.to_ndarray(format="rgb24")  # a header may promise more frames than there are
    return [kept.get(i, end) for i in evenly(total, frames).tolist()]


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingExtra("av", "video") from None
    return av


def _pictures(folder: Path) -> list[Path]:
    """The images right in a folder, by name; numbers in names count as numbers (2 before 10)."""

    def key(p: Path) -> list[Any]:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", p.stem)]

    return sorted((p for p in folder.iterdir() if p.suffix.lower() in FORMATS and p.is_file()), key=key)


# data sets ----------------------------------------------------------------------------------------------------------


@dataclass
class Videos:
    """Video files by index, decoded when asked for: frames (uint8 [frames, height, width, 3]), id, and label where there is one."""

    root: str
    paths: list[str]
    labels: list[int] | None = None
    frames: int = FRAMES

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        sample: Sample = {"frames": frames_of(path, self.frames), "id": os.path.relpath(path, self.root)}
        return sample if self.labels is None else {**sample, "label": self.labels[index]}


@dataclass
class Clips:
    """Videos in memory: uint8 [videos, frames, height, width, 3], labels, ids."""

    clips: np.ndarray
    labels: np.ndarray
    ids: list[str]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Sample:
        return {"frames": self.clips[index], "label": int(self.labels[index]), "id": self.ids[index]}


def read(path: str | Path, *, frames: int = FRAMES, strict: bool = False, holdout: float = 0.2, seed: int = 0) -> Data:
    """The videos of a folder, real and fake; see above for the layouts.

    frames: how many are looked at in each video. strict: fail on videos that can't be read, rather than leave them out and name them in
    `notes`. holdout: the share of either class that becomes "val" where the folder has no split of its own, at least one video.
    Raises BadInput: no such folder, a file, no videos, one class only, all unreadable, too few to split.
    """
    root = Path(path)
    if not root.exists():
        raise BadInput(str(path), expected="a folder of videos", got="no such path")
    if not root.is_dir():
        raise BadInput(str(path), expected="a folder with real/ and fake/ in it", got="a file", fix="give the folder")
    if frames < 1:
        raise BadInput("frames", expected="at least 1", got=str(frames))
    found, notes = _found(root)
    if not any(videos for classes in found.values() for videos in classes.values()):
        wanted = f"videos ({', '.join(FILMS[:4])}), folders of frames or pictures in real/ and fake/"
        raise BadInput(str(path), expected=wanted, got=_is(root))
    bad = [p for classes in found.values() for videos in classes.values() for p in videos if not _readable(p)]
    if bad and strict:
        raise BadInput(f"{len(bad)} of {path}'s videos", expected="ones that decode", got=_few(bad, root), fix="or leave out --strict")
    if bad:
        gone = {*bad}
        found = {split: {c: [p for p in videos if p not in gone] for c, videos in classes.items()} for split, classes in found.items()}
        notes.append(f"{len(bad)} videos that can't be decoded left out: {_few(bad, root)}")
    totals = {c: sum(len(classes.get(c, [])) for classes in found.values()) for c in (FAKE, REAL)}
    if not any(totals.values()):
        raise BadInput(str(path), expected="videos that decode", got=f"{len(bad)} that don't: {_few(bad, root)}")
    for c in (FAKE, REAL):
        if not totals[c]:
            raise BadInput(str(path), expected="real and fake videos", got=f"no {NAMES[c]} ones", fix=f"put some in {NAMES[c]}/")
    splits = found if "train" in found else _split(found["all"], holdout, seed)
    for c in (FAKE, REAL):
        if not splits["train"].get(c):
            raise BadInput(f"{path}/train", expected="real and fake videos", got=f"no {NAMES[c]} ones")
    datasets: dict[str, Any] = {}
    for split, classes in splits.items():
        paths = [str(p) for c in (FAKE, REAL) for p in classes.get(c, [])]
        datasets[split] = Videos(str(root), paths, [c for c in (FAKE, REAL) for _ in classes.get(c, [])], frames)
    if "val" not in datasets:
        datasets["val"] = datasets["test"]
    return Data(root.name, "deepfake-detection", datasets, {}, list(NAMES), notes, {"path": str(root)})


Found = dict[str, dict[int, list[Path]]]


def _found(root: Path) -> tuple[Found, list[str]]:
    """split -> class -> videos, and what there is to say of the folder."""
    if (root / "metadata.json").is_file():
        return _challenge(root)
    given = {_SPLITS[d.name.lower()]: d for d in _folders(root) if d.name.lower() in _SPLITS}
    if "train" in given and len(given) > 1:
        return {split: _classes(folder)[0] for split, folder in given.items()}, []
    classes, unknown = _classes(root)
    return {"all": classes}, [f"folders that are neither real nor fake left out: {', '.join(unknown)}"] if unknown else []


def _classes(root: Path) -> tuple[dict[int, list[Path]], list[str]]:
    found: dict[int, list[Path]] = {}
    unknown = []
    for folder in _folders(root):
        label = _CLASSES.get(folder.name.lower())
        if label is None:
            unknown.append(folder.name)
        else:
            found.setdefault(label, []).extend(_videos(folder))
    return found, unknown


def _videos(folder: Path) -> list[Path]:
    """Films below a folder, the pictures right in it, and folders of frames below it."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in FILMS]
    return sorted([*found, *_pictures(folder), *(d for d in folder.rglob("*") if d.is_dir() and _pictures(d))])


def _challenge(root: Path) -> tuple[Found, list[str]]:
    try:
        listed = json.loads((root / "metadata.json").read_text(encoding="utf-8"))
        labels = {name: str(entry["label"]).lower() for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadInput(
            str(root / "metadata.json"), expected='{"name.mp4": {"label": "FAKE"}, ...}', got=f"{type(e).__name__}: {e}"
        ) from None
    found: Found = {}
    missing = []
    for name, label in labels.items():
        if label not in NAMES:
            raise BadInput(f"metadata.json's label of {name}", expected="FAKE or REAL", got=label)
        if not (root / name).exists():
            missing.append(root / name)
            continue
        split = _SPLITS.get(str(listed[name].get("split", "")).lower(), "all")
        found.setdefault(split, {}).setdefault(NAMES.index(label), []).append(root / name)
    if len(found) == 1 or "train" not in found:  # one split only: make another
        merged: dict[int, list[Path]] = {}
        for classes in found.values():
            for c, videos in classes.items():
                merged.setdefault(c, []).extend(videos)
        found = {"all": merged}
    found.pop("all", None) if len(found) > 1 else None
    return found, [f"{len(missing)} videos that metadata.json lists aren't there: {_few(missing, root)}"] if missing else []


def _split(classes: Mapping[int, list[Path]], holdout: float, seed: int) -> Found:
    rng = np.random.default_rng(seed)
    splits: Found = {"train": {}, "val": {}}
    for c in (FAKE, REAL):
        videos = classes[c]
        if len(videos) < 2:
            raise BadInput(f"{NAMES[c]}/", expected="at least two videos, one to train on and one to test on", got="one")
        held = {*rng.permutation(len(videos))[: max(1, round(holdout * len(videos)))].tolist()}
        splits["train"][c] = [v for i, v in enumerate(videos) if i not in held]
        splits["val"][c] = [v for i, v in enumerate(videos) if i in held]
    return splits


def _readable(path: Path) -> bool:
    try:
        frames_of(path, 1)
    except BadInput:
        return False
    return True


def _folders(root: Path) -> list[Path]:
    return sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))


def _few(paths: Sequence[Path], root: Path, most: int = 5) -> str:
    names = [os.path.relpath(p, root) for p in paths[:most]]
    return ", ".join(names) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def _is(root: Path) -> str:
    folders, files = _folders(root), sum(1 for p in root.rglob("*") if p.is_file())
    if not folders and not files:
        return "an empty folder"
    return f"folders {', '.join(d.name for d in folders[:5])} with {files} files" if folders else f"{files} files and no folders"


# for predictions ----------------------------------------------------------------------------------------------------


def inputs(paths: Sequence[str | Path], frames: int = FRAMES) -> Videos:
    """Unlabelled videos: films, folders of frames or of videos, pictures, globs. BadInput for what isn't there or isn't a video."""
    found: list[Path] = []
    for entry in paths:
        p = Path(entry)
        if p.is_dir():
            inside = [p] if _pictures(p) else _videos(p)
            if not inside:
                raise BadInput(str(entry), expected="a folder of frames or with videos", got="none in it")
            found += inside
        elif p.is_file():
            found.append(p)
        elif hits := sorted(glob.glob(str(entry), recursive=True)):
            found += [Path(h) for h in hits]
        else:
            raise BadInput(str(entry), expected="a video, a folder or a glob", got="no such path")
    if not found:
        raise BadInput("videos", expected="at least one", got="none")
    bad = {p for p in found if not _readable(p)}
    if len(bad) == len(found):
        raise BadInput(", ".join(str(p) for p in sorted(bad)[:5]), expected="a video", got="a file that can't be decoded as one")
    if bad:
        warnings.warn(f"{len(bad)} files that can't be decoded left out: {', '.join(str(p) for p in sorted(bad)[:5])}", stacklevel=2)
    kept = [str(p) for p in found if p not in bad]
    return Videos(os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in kept]), kept, None, frames)


def is_single(value: Any) -> bool:
    """Whether a value in memory is one video (frames as an array, or one picture) rather than several."""
    return isinstance(value, (Mapping, Image.Image)) or (hasattr(value, "dtype") and hasattr(value, "ndim") and value.ndim != 5)


def from_memory(value: Any, index: int) -> Sample:
    """A raw sample of frames in memory: an array or tensor [frames, height, width, 3] (tensors: [frames, 3, height, width]), uint8 or
    float in [0, 1]; a picture; or a sample as a dict."""
    import torch

    name, x = f"input {index}", value
    if isinstance(x, Mapping):
        return {"id": name, **x}
    if isinstance(x, Image.Image):
        x = to_rgb(x)
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = (x.movedim(-3, -1) if x.ndim >= 3 and x.shape[-1] != 3 else x).numpy()
    if not isinstance(x, np.ndarray):
        raise BadInput(name, expected="frames as an array or a tensor", got=type(value).__name__)
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[3] != 3 or not x.size:
        raise BadInput(name, expected="frames [frames, height, width, 3]", got=f"{x.dtype} {[*x.shape]}")
    if np.issubdtype(x.dtype, np.floating):
        if not np.isfinite(x).all() or x.min() < 0 or x.max() > 1:
            raise BadInput(name, expected="values in [0, 1]", got=f"{x.min():.3g} to {x.max():.3g}")
        x = (x * 255).round().astype(np.uint8)
    if x.dtype != np.uint8:
        raise BadInput(name, expected="uint8 or float values", got=str(x.dtype))
    return {"id": name, "frames": x[evenly(len(x), FRAMES)] if len(x) > FRAMES else x}


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents, from transformed samples (frames: float32 [frames, 3, height, width]). Where videos have
    different numbers of frames, the shorter ones give theirs more than once, evenly."""
    import torch

    most = max(len(s["frames"]) for s in samples)
    frames = [s["frames"] if len(s["frames"]) == most else s["frames"][evenly(len(s["frames"]), most)] for s in samples]
    batch: dict[str, Any] = {"frames": torch.from_numpy(np.stack(frames)), "id": [s["id"] for s in samples]}
    if "label" in samples[0]:
        batch["label"] = torch.tensor([s["label"] for s in samples], dtype=torch.int64)
    return batch
