"""Reading and writing motions: HumanML3D's folders, joints and features as .npy, BVH, captions as text.

folder/new_joint_vecs/NAME.npy (or new_joints/), folder/texts/NAME.txt, and folder/train.txt, val.txt, test.txt with names, where there
are any. A line of a text file is a caption, with HumanML3D's "#tokens#start#end" behind it or without; start and end are seconds of the
part meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formarium.errors import BadInput
from formarium.task import Data, Sample, file_stem
from formarium.tasks.motion_generation.skeleton import DIM, FPS, JOINTS, to_features

SHORTEST = 8  # frames


@dataclass
class Arrays:
    """Samples in memory."""

    samples: list[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def load_motion(path: str | Path) -> np.ndarray:
    """Features float32 [frames, 263] from a .npy of features or of joints [frames, 22, 3] (or [frames, 66]), or a BVH that we wrote.
    BadInput for anything else, for NaN, and for motions too short."""
    path = Path(path)
    if path.suffix.lower() == ".bvh":
        from formarium.tasks.motion_generation.bvh import joints_of, read_bvh

        names, positions, _ = read_bvh(path)
        return as_features(joints_of(names, positions), str(path))
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise BadInput(str(path), expected="a .npy file of a motion, or .bvh", got=f"{type(e).__name__}: {e}") from None
    return as_features(array, str(path))


def as_features(array: np.ndarray, name: str) -> np.ndarray:
    """Features or joints as features float32 [frames, 263]."""
    if array.ndim == 2 and array.shape[1] == JOINTS * 3:
        array = array.reshape(-1, JOINTS, 3)
    joints = array.ndim == 3 and array.shape[1:] == (JOINTS, 3)
    if not joints and not (array.ndim == 2 and array.shape[1] == DIM):
        raise BadInput(name, expected=f"[frames, {DIM}] features or [frames, {JOINTS}, 3] joints", got=f"{[*array.shape]}")
    if not np.issubdtype(array.dtype, np.number) or not np.isfinite(array).all():
        raise BadInput(
            name, expected="finite numbers", got="NaN or infinite ones" if np.issubdtype(array.dtype, np.number) else str(array.dtype)
        )
    if len(array) < SHORTEST:
        raise BadInput(name, expected=f"at least {SHORTEST} frames", got=str(len(array)))
    return to_features(array) if joints else array.astype(np.float32)


def captions_in(path: Path, motion: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """(caption, the part of the motion it means) of each line of a text file."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        parts = [p.strip() for p in line.split("#")]
        if not parts[0]:
            continue
        try:
            start, end = (float(p) for p in parts[2:4]) if len(parts) >= 4 else (0.0, 0.0)
        except ValueError:
            start = end = 0.0
        start, end = (v if np.isfinite(v) else 0.0 for v in (start, end))
        part = motion[int(start * FPS) : int(end * FPS)] if end > start else motion
        if len(part) >= SHORTEST:
            found.append((parts[0], part))
    return found


def read(path: str | Path, *, holdout: float = 0.2, seed: int = 0) -> Data:
    """Motions with captions of a folder (see the module). holdout: share of motions that becomes "val" where no lists say.

    Raises BadInput: no such folder, no motions, none with a caption, none that can be used, too few to split.
    """
    root = Path(path)
    if not root.is_dir():
        raise BadInput(str(path), expected="a folder of motions", got="a file" if root.exists() else "no such path")
    folder = next((root / n for n in ("new_joint_vecs", "new_joints", "motions") if (root / n).is_dir()), root)
    files = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in (".npy", ".bvh") and p.stem not in ("Mean", "Std")}
    if not files:
        raise BadInput(str(path), expected="motions (.npy or .bvh), e.g. in new_joint_vecs/", got="none in it")
    texts = root / "texts" if (root / "texts").is_dir() else folder
    bad, silent, samples = [], [], {}
    for name, file in files.items():
        text = texts / f"{name}.txt"
        if not text.is_file():
            silent.append(name)
            continue
        try:
            found = captions_in(text, load_motion(file))
        except BadInput as e:
            bad.append((name, e))
            continue
        if not found:
            silent.append(name)
            continue
        samples[name] = [{"motion": part, "caption": caption, "id": f"{name}:{i}"} for i, (caption, part) in enumerate(found)]
    notes = []
    if silent:
        notes.append(f"{len(silent)} motions without a caption left out: {', '.join(silent[:5])}")
    if bad:
        notes.append(f"{len(bad)} motions that can't be used left out: {', '.join(n for n, _ in bad[:5])}")
    if not samples:
        raise BadInput(
            str(path), expected="motions with captions (texts/NAME.txt)", got=str(bad[0][1]) if bad else f"{len(silent)} without any"
        )
    lists = {s: root / f"{s}.txt" for s in ("train", "val", "test") if (root / f"{s}.txt").is_file()}
    if "train" in lists and len(lists) > 1:
        members = {s: [n for n in file.read_text(encoding="utf-8").split() if n in samples] for s, file in lists.items()}
        members.setdefault("val", members.get("test", []))
    else:
        names = [[*samples][i] for i in np.random.default_rng(seed).permutation(len(samples))]
        last = max(1, round(holdout * len(names)))
        members = {"train": sorted(names[:-last]), "val": sorted(names[-last:])}
    if not members["train"] or not members["val"]:
        raise BadInput(str(path), expected="motions for training and for testing", got=f"{len(samples)} in all")
    splits = {s: Arrays([sample for n in names for sample in samples[n]]) for s, names in members.items()}
    return Data(root.name, "motion-generation", {**splits}, {}, (), notes, {"path": str(root)})


def inputs(paths: Sequence[str | Path]) -> Arrays:
    """Captions to make motions of: text files (a caption a line), or the captions themselves; a number of frames may follow a "#".
    Motions (.npy, .bvh) come without a caption."""
    samples: list[Sample] = []
    for entry in paths:
        p = Path(entry)
        if p.suffix.lower() in (".npy", ".bvh"):
            samples.append({"motion": load_motion(p), "caption": "", "id": str(entry)})
        elif p.suffix.lower() == ".txt":
            if not p.is_file():
                raise BadInput(str(entry), expected="a text file of captions", got="no such file")
            samples += [_wanted(line) for line in p.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            samples.append(_wanted(str(entry)))
    if not samples:
        raise BadInput("captions", expected="at least one", got="none")
    return Arrays(samples)


def _wanted(line: str) -> Sample:
    caption, _, frames = (p.strip() for p in line.partition("#"))
    if not caption:
        raise BadInput("caption", expected="words", got=repr(line))
    if not frames:
        return {"caption": caption, "id": caption}
    if not frames.isdigit() or int(frames) < 1:
        raise BadInput(f"{caption!r}", expected="a number of frames after #", got=repr(frames))
    return {"caption": caption, "length": int(frames), "id": caption}


@dataclass
class Prepare:
    """Raw sample to what the batch holds. preprocessing: max_length, frames a motion has at most: in training a longer one gives a random
    window, otherwise its start; it is also how long a motion gets where nothing says."""

    preprocessing: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        most = self.preprocessing.get("max_length", 196)
        out: Sample = {"caption": str(sample.get("caption", "")), "id": str(sample.get("id", "motion"))}
        out["group"] = str(sample.get("group", out["caption"]))
        if "motion" not in sample:
            length = int(sample.get("length", most))
            if not 1 <= length <= most:
                raise BadInput(f"{out['id']}'s length", expected=f"1 to {most} frames", got=str(length))
            return {**out, "length": length}
        motion = as_features(np.asarray(sample["motion"]), out["id"])
        first = int(rng.integers(len(motion) - most + 1)) if self.recipe is not None and len(motion) > most else 0
        out["motion"] = motion[first : first + most]
        return {**out, "length": len(out["motion"])}


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents."""
    import torch

    batch: dict[str, Any] = {key: [s[key] for s in samples] for key in ("caption", "group", "id")}
    batch["length"] = torch.tensor([s["length"] for s in samples], dtype=torch.int64)
    there = ["motion" in s for s in samples]
    if all(there):
        motion = np.zeros((len(samples), max(s["length"] for s in samples), DIM), np.float32)
        for row, s in zip(motion, samples, strict=True):
            row[: s["length"]] = s["motion"]
        batch["motion"] = torch.from_numpy(motion)
    elif any(there):
        raise BadInput("samples", expected="a motion each, or none at all", got=f"{sum(there)} of {len(there)} with one")
    return batch


def write(prediction: Any, batch: Mapping[str, Any], folder: Path) -> list[Path]:
    """Of each motion its joints (.npy [frames, 22, 3], metres), its features (NAME_features.npy), a BVH and an animation (GIF)."""
    from formarium.tasks.motion_generation.bvh import write_bvh
    from formarium.tasks.motion_generation.draw import write_gif

    folder, paths = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    ids = batch.get("id") or [str(i) for i in range(len(prediction.joints))]
    for i, name in enumerate(ids):
        frames, stem = int(prediction.length[i]), file_stem(str(name).replace(":", " "))
        joints = prediction.joints[i, :frames].float().cpu().numpy()
        np.save(folder / f"{stem}.npy", joints)
        np.save(folder / f"{stem}_features.npy", prediction.motion[i, :frames].float().cpu().numpy())
        paths += [folder / f"{stem}.npy", folder / f"{stem}_features.npy", write_bvh(folder / f"{stem}.bvh", joints)]
        paths.append(write_gif(joints, folder / f"{stem}.gif", (batch.get("caption") or [""] * len(ids))[i]))
    return paths
