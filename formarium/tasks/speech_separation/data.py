"""Reading mixtures with their sources, and mixing them anew.

root/{train,val,test}/{mix,s1,s2,...}/name.wav   as given (tr, cv and tt, as in WSJ0-2mix, are understood too)
root/{mix,s1,s2,...}/name.wav                    split by the seed, a fifth held out

The folder of mixtures may be called mix, mixture, mix_clean, mix_both or mix_single, as long as there is one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formarium.errors import BadInput
from formarium.task import Data, Sample
from formarium.tasks import sound
from formarium.tasks.sound import SPLITS, few, files_of, resample, usable

SHORTEST = 0.05  # seconds
RATE = 8000
_MIX = ("mix", "mixture", "mix_clean", "mix_both", "mix_single")
_SPLITS = {**SPLITS, "tr": "train", "cv": "val", "tt": "test"}


@dataclass
class Mixtures:
    """Mixtures by path, with the paths of their sources where they are known."""

    root: str
    paths: list[str]
    sources: list[list[str]] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        clip = sound.load(path)
        name = str(Path(path).relative_to(self.root)) if self.root and Path(path).is_relative_to(self.root) else path
        sample: Sample = {"mixture": clip.audio, "rate": clip.rate, "notes": clip.notes, "id": name}
        if self.sources is not None:
            parts = [sound.load(p) for p in self.sources[index]]
            if {p.rate for p in parts} != {clip.rate}:
                raise BadInput(f"sources of {name}", expected=f"{clip.rate} Hz, the mixture's rate", got=f"{[p.rate for p in parts]}")
            sizes = [len(p.audio) for p in parts]
            if {*sizes} != {len(clip.audio)}:
                raise BadInput(f"sources of {name}", expected=f"{len(clip.audio)} samples, as in the mixture", got=f"{sizes}")
            sample["sources"] = np.stack([p.audio for p in parts])
        return sample


@dataclass
class Mixed:
    """Mixtures in memory, the sums of their sources: float32 [mixtures, speakers, samples]."""

    sources: np.ndarray
    rate: int
    ids: list[str]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Sample:
        parts = self.sources[index]
        return {"mixture": parts.sum(0), "sources": parts, "rate": self.rate, "notes": (), "id": self.ids[index]}


def read(path: str | Path, *, strict: bool = False, holdout: float = 0.2, seed: int = 0) -> Data:
    """Mixtures with their sources, in either of the layouts above.

    Mixtures that can't be used (a source is missing, a file doesn't decode, is silent or shorter than 0.05 s) are left out and named in
    `notes`; with `strict` they are errors. Raises BadInput: no such folder, nothing usable.
    """
    root = Path(path)
    if not root.is_dir():
        raise BadInput(str(path), expected="a folder with mix, s1, s2, ...", got="a file" if root.exists() else "no such path")
    given = {_SPLITS[d.name.lower()]: d for d in sorted(root.iterdir()) if d.is_dir() and d.name.lower() in _SPLITS}
    folders = given if "train" in given and len(given) > 1 else {"all": root}
    found, notes, speakers = {}, [], set()
    for split, folder in folders.items():
        found[split], count, lonely = _pairs(folder)
        speakers.add(count)
        if lonely and (strict or not found[split]):
            raise BadInput(
                f"{len(lonely)} mixtures in {folder}", expected="a file of the same name in every source's folder", got=few(lonely)
            )
        if lonely:
            notes.append(f"{len(lonely)} mixtures without all their sources left out: {few(lonely)}")
    if len(speakers) > 1:
        raise BadInput(str(path), expected="as many speakers in every split", got=f"{sorted(speakers)}")
    good, said = usable([p for pairs in found.values() for m, s in pairs for p in (m, *s)], SHORTEST, strict, str(path))
    found = {split: [(m, s) for m, s in pairs if {m, *s} <= good] for split, pairs in found.items()}
    if "train" not in found:
        pairs = found["all"]
        train, val = sound.split(len(pairs), holdout, seed)
        found = {"train": [pairs[i] for i in train], "val": [pairs[i] for i in val]}
    splits: dict[str, Any] = {k: Mixtures(str(root), [m for m, _ in pairs], [s for _, s in pairs]) for k, pairs in found.items()}
    if "val" not in splits:
        splits["val"] = splits["test"]
    return Data(root.name, "speech-separation", splits, {"speakers": speakers.pop()}, (), notes + said, {"path": str(root)})


def _pairs(folder: Path) -> tuple[list[tuple[str, list[str]]], int, list[str]]:
    """(mixture, sources) of a folder, how many speakers, and the names of mixtures that lack a source."""
    there = {d.name.lower(): d for d in folder.iterdir() if d.is_dir()}
    mixes = [there[n] for n in _MIX if n in there]
    sources = [there[f"s{i}"] for i in range(1, 10) if f"s{i}" in there]
    if len(mixes) != 1 or len(sources) < 2:
        raise BadInput(str(folder), expected="folders mix, s1 and s2 (s3 ...)", got=", ".join(sorted(there)) or "no folders")
    files = [f for f in sorted(mixes[0].rglob("*")) if f.suffix.lower() in sound.FORMATS]
    pairs, lonely = [], []
    for f in files:
        parts = [s / f.relative_to(mixes[0]) for s in sources]
        if all(p.is_file() for p in parts):
            pairs.append((str(f), [*map(str, parts)]))
        else:
            lonely.append(f.name)
    if not files:
        raise BadInput(str(mixes[0]), expected="sound files", got="none")
    return pairs, len(sources), lonely


def inputs(paths: Sequence[str | Path]) -> Mixtures:
    """Mixtures to separate: files, folders (all sound files below) and globs. BadInput for what isn't there."""
    return Mixtures("", files_of(paths))


def is_single(value: Any) -> bool:
    """Whether a value in memory is one recording: a dict, or an array of samples ([samples, channels] with few channels)."""
    if isinstance(value, Mapping):
        return True
    return hasattr(value, "ndim") and (value.ndim == 1 or (value.ndim == 2 and value.shape[1] <= 2))


def from_memory(value: Any, index: int) -> Sample:
    """A mixture in memory: an array or tensor at the model's rate, or {"mixture": array, "rate": hertz}."""
    extra = dict(value) if isinstance(value, Mapping) else {}
    clip = sound.from_array(extra.get("mixture", extra.get("audio")) if extra else value, index, extra.get("rate"))
    return {"id": f"input {index}", **extra, "mixture": clip.audio, "rate": clip.rate, "notes": clip.notes}


@dataclass
class Prepare:
    """A mixture as the model's batch holds it: at its rate, and in training a piece of `crop` seconds (shorter ones filled with silence).

    preprocessing: rate. recipe: crop.
    """

    preprocessing: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        rate = int(self.preprocessing.get("rate", RATE))
        clip = sound.prepared(sound.Clip(sample["mixture"], sample["rate"], tuple(sample.get("notes", ()))), rate, sample["id"], SHORTEST)
        made: Sample = {"mixture": clip.audio, "rate": rate, "notes": "; ".join(clip.notes), "id": sample["id"]}
        if "sources" in sample:
            made["sources"] = resample(sample["sources"], sample["rate"], rate) if sample["rate"] else sample["sources"]
        crop = int((self.recipe or {}).get("crop", 0) * rate)
        if crop:
            start = int(rng.integers(0, max(1, len(clip.audio) - crop + 1)))
            for key in ("mixture", "sources"):
                if key in made:
                    piece = made[key][..., start : start + crop]
                    made[key] = np.pad(piece, [(0, 0)] * (piece.ndim - 1) + [(0, crop - piece.shape[-1])])
        return made


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents. ValueError for recordings of different lengths, which then go in batches of their own."""
    batch: dict[str, Any] = {
        "mixture": torch.from_numpy(np.stack([s["mixture"] for s in samples]).astype(np.float32)),
        "rate": torch.tensor([s["rate"] for s in samples]),
        "notes": [s["notes"] for s in samples],
        "id": [s["id"] for s in samples],
    }
    if "sources" in samples[0]:
        batch["sources"] = torch.from_numpy(np.stack([s["sources"] for s in samples]).astype(np.float32))
    return batch


@dataclass
class Remix:
    """Dynamic mixing: with some probability, a batch's sources meet in new mixtures, each up to `gain` dB louder or softer.

    What a mixture has beside its sources (noise) stays in it.
    """

    probability: float
    gain: float

    def __call__(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        sources = batch["sources"]
        b, n, _ = sources.shape
        if torch.rand((), generator=generator) >= self.probability:
            return batch
        noise = batch["mixture"] - sources.sum(1)
        met = torch.stack([sources[torch.randperm(b, generator=generator), i] for i in range(n)], 1)
        met = met * 10 ** (self.gain * (2 * torch.rand(b, n, 1, generator=generator) - 1) / 20)
        return {**batch, "sources": met, "mixture": met.sum(1) + noise}


def write_folder(data: Data, root: str | Path) -> Path:
    """Write mixtures in memory as the folders that `read` takes: root/train/mix/00000.wav, root/train/s1/00000.wav, ..."""
    root = Path(root)
    for split, dataset in data.splits.items():
        for i in range(len(dataset)):
            s = dataset[i]
            for name, audio in [("mix", s["mixture"]), *((f"s{j + 1}", part) for j, part in enumerate(s["sources"]))]:
                (root / split / name).mkdir(parents=True, exist_ok=True)
                sound.save(root / split / name / f"{i:05d}.wav", audio, s["rate"])
    return root
