"""Reading recordings with their transcripts, and making features of them.

folder/**/name.wav and name.txt beside it      split by the seed, a fifth held out
folder/train/..., folder/val/... (or test)     as given
folder/**/x.trans.txt                          lines "name words ...", as LibriSpeech has them
folder/metadata.csv, .tsv or .jsonl            or such a file itself: columns path (or file, audio, audio_filepath, wav) and text (or
                                               transcript, transcription, sentence), and split where there is one; paths relative to it
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formarium.errors import BadInput
from formarium.nn.audio import log_mel, spec_augment
from formarium.task import Data, Sample
from formarium.tasks import sound
from formarium.tasks.sound import SPLITS, few, files_of, resample, usable
from formarium.tasks.speech_recognition.vocabulary import chosen, encode, normalised

SHORTEST = 0.1  # seconds
RATE = 16000
_AUDIO = ("path", "file", "audio", "audio_filepath", "wav", "filename")
_TEXT = ("text", "transcript", "transcription", "sentence")
MANIFESTS = (".csv", ".tsv", ".jsonl")


@dataclass
class Recordings:
    """Sound files by path, with their transcripts where they are known."""

    root: str
    paths: list[str]
    texts: list[str] | None = None
    symbols: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        clip = sound.load(path)
        name = str(Path(path).relative_to(self.root)) if self.root and Path(path).is_relative_to(self.root) else path
        sample: Sample = {"audio": clip.audio, "rate": clip.rate, "notes": clip.notes, "id": name}
        if self.texts is not None:
            sample |= {"text": self.texts[index], "tokens": encode(self.texts[index], self.symbols, name)}
        return sample


@dataclass
class Spoken:
    """Recordings in memory: float32 [samples] each, all of one rate."""

    audio: list[np.ndarray]
    rate: int
    texts: list[str]
    symbols: Sequence[str]
    ids: list[str]

    def __len__(self) -> int:
        return len(self.audio)

    def __getitem__(self, index: int) -> Sample:
        text = self.texts[index]
        tokens = encode(text, self.symbols)
        return {"audio": self.audio[index], "rate": self.rate, "notes": (), "text": text, "tokens": tokens, "id": self.ids[index]}


def read(
    path: str | Path, *, vocabulary: str | Sequence[str] = "english", strict: bool = False, holdout: float = 0.2, seed: int = 0
) -> Data:
    """Recordings with transcripts, in any of the layouts above.

    vocabulary: "english" (a to z, apostrophe, space), "auto" (the characters there are), "words" (the words there are), or symbols.
    Transcripts are put in lower case and lose their punctuation. Recordings that can't be used (no transcript or an empty one, a file
    that doesn't decode, silence, less than 0.1 s) are left out and named in `notes`; with `strict` they are errors.
    Raises BadInput: no such path, nothing usable, a transcript with characters outside the vocabulary.
    """
    root = Path(path)
    if not root.exists():
        raise BadInput(str(path), expected="a folder of recordings or a manifest", got="no such path")
    found, notes = _found(root)
    empty = [Path(p).name for texts in found.values() for p, t in texts.items() if not t]
    if empty and (strict or all(not t for texts in found.values() for t in texts.values())):
        raise BadInput(f"{len(empty)} of {path}'s transcripts", expected="words", got=f"an empty transcript: {few(empty)}")
    if empty:
        notes.append(f"{len(empty)} recordings with an empty transcript left out: {few(empty)}")
    kept = {split: {p: t for p, t in texts.items() if t} for split, texts in found.items()}
    good, said = usable([p for texts in kept.values() for p in texts], SHORTEST, strict, str(path))
    kept = {split: {p: t for p, t in texts.items() if p in good} for split, texts in kept.items()}
    if "train" not in kept:
        texts = {p: t for split in kept.values() for p, t in split.items()}
        train, val = sound.split(len(texts), holdout, seed)
        names = [*texts]
        kept = {"train": {names[i]: texts[names[i]] for i in train}, "val": {names[i]: texts[names[i]] for i in val}}
    symbols = chosen(vocabulary, [t for texts in kept.values() for t in texts.values()])
    for texts in kept.values():
        for p, t in texts.items():
            encode(t, symbols, f"the transcript of {Path(p).name}")
    base = str(root if root.is_dir() else root.parent)
    splits: dict[str, Any] = {split: Recordings(base, [*texts], [*texts.values()], symbols) for split, texts in kept.items()}
    if "val" not in splits:
        splits["val"] = splits["test"]
    args = {"vocabulary_size": len(symbols), "vocabulary": symbols}
    return Data(root.name, "speech-recognition", splits, args, symbols, notes + said, {"path": str(root)})


def _found(root: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Split ("all" where there is none) -> path -> transcript, and notes."""
    if root.is_file():
        if root.suffix.lower() not in MANIFESTS:
            raise BadInput(str(root), expected=f"a folder, or a manifest ({', '.join(MANIFESTS)})", got=f"a {root.suffix or 'plain'} file")
        return _manifest(root)
    manifests = sorted(f for f in root.iterdir() if f.is_file() and f.suffix.lower() in MANIFESTS)
    if len(manifests) == 1:
        return _manifest(manifests[0])
    given = {SPLITS[d.name.lower()]: d for d in sorted(root.iterdir()) if d.is_dir() and d.name.lower() in SPLITS}
    folders = given if "train" in given and len(given) > 1 else {"all": root}
    found, bare = {}, []
    for split, folder in folders.items():
        files = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in sound.FORMATS]
        listed = {str(t.parent / name): text for t in folder.rglob("*.trans.txt") for name, text in _lines(t)}
        texts = {}
        for f in files:
            beside = f.with_suffix(".txt")
            if beside.is_file():
                texts[str(f)] = normalised(_text(beside))
            elif str(f.with_suffix("")) in listed:
                texts[str(f)] = normalised(listed[str(f.with_suffix(""))])
            else:
                bare.append(f.name)
        found[split] = texts
    if not any(found.values()):
        got = f"{len(bare)} sound files, none with a transcript beside it" if bare else "no sound files"
        raise BadInput(str(root), expected="name.wav with name.txt beside it, or a manifest", got=got)
    return found, [f"{len(bare)} sound files without a transcript left out: {few(bare)}"] if bare else []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(str(path), expected="text in UTF-8", got="another encoding") from None


def _lines(path: Path) -> list[tuple[str, str]]:
    pairs = [line.split(maxsplit=1) for line in _text(path).splitlines() if line.strip()]
    return [(p[0], p[1] if len(p) > 1 else "") for p in pairs]


def _manifest(path: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    rows: list[dict[str, Any]]
    try:
        if path.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in _text(path).splitlines() if line.strip()]
        else:
            rows = [*csv.DictReader(_text(path).splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")]
    except (json.JSONDecodeError, csv.Error) as e:
        raise BadInput(str(path), expected="one JSON object a line" if "json" in path.suffix else "a table", got=str(e)) from None
    if not rows:
        raise BadInput(str(path), expected="a manifest with a line for each recording", got="none")
    columns = [c for c in rows[0] if c] if isinstance(rows[0], dict) else []
    audio, text = (next((c for c in names if c in columns), "") for names in (_AUDIO, _TEXT))
    if not audio or not text:
        wanted = f"columns {_AUDIO[0]} (or {', '.join(_AUDIO[1:])}) and {_TEXT[0]} (or {', '.join(_TEXT[1:])})"
        raise BadInput(str(path), expected=wanted, got=", ".join(columns) or "no column names")
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        where = Path(str(row[audio]))
        split = SPLITS.get(str(row.get("split") or "all").lower(), "all")
        found.setdefault(split, {})[str(where if where.is_absolute() else path.parent / where)] = normalised(str(row[text] or ""))
    if "train" in found and len(found) == 1:
        found = {"all": found["train"]}
    return found, []


def inputs(paths: Sequence[str | Path]) -> Recordings:
    """Unlabelled recordings: files, folders (all sound files below) and globs. BadInput for what isn't there."""
    return Recordings("", files_of(paths))


def is_single(value: Any) -> bool:
    """Whether a value in memory is one recording: a dict, or an array of samples ([samples, channels] with few channels)."""
    if isinstance(value, Mapping):
        return True
    return hasattr(value, "ndim") and (value.ndim == 1 or (value.ndim == 2 and value.shape[1] <= 2))


def from_memory(value: Any, index: int) -> Sample:
    """A recording in memory: an array or tensor at the model's rate, or {"audio": array, "rate": hertz}."""
    extra = dict(value) if isinstance(value, Mapping) else {}
    clip = sound.from_array(extra.get("audio", value) if extra else value, index, extra.get("rate"))
    return {"id": f"input {index}", **extra, "audio": clip.audio, "rate": clip.rate, "notes": clip.notes}


@dataclass
class Prepare:
    """A recording to the features of the model's batch; with a recipe, augmented: another speed, SpecAugment's masks.

    preprocessing: rate, mels, window_ms, hop_ms, emphasis, range_db. recipe: time_masks, time_mask_share, frequency_masks,
    frequency_mask_width; speed: the largest relative change of it (0.1: from 0.9 to 1.1 times).
    """

    preprocessing: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        p, r = self.preprocessing, self.recipe or {}
        rate = int(p.get("rate", RATE))
        clip = sound.prepared(sound.Clip(sample["audio"], sample["rate"], tuple(sample.get("notes", ()))), rate, sample["id"], SHORTEST)
        audio = clip.audio
        if r.get("speed"):
            audio = resample(audio, 100, round(100 * rng.uniform(1 - r["speed"], 1 + r["speed"])))
        keys = ("mels", "window_ms", "hop_ms", "emphasis", "range_db")
        with torch.no_grad():
            features = log_mel(torch.from_numpy(audio), rate, **{k: p[k] for k in keys if k in p}).numpy()
        if r:
            features = spec_augment(
                features, rng, r.get("time_masks", 0), r.get("time_mask_share", 0.05),
                r.get("frequency_masks", 0), r.get("frequency_mask_width", 27),
            )  # fmt: skip
        made = {"features": features, "seconds": len(clip.audio) / rate, "notes": "; ".join(clip.notes), "id": sample["id"]}
        return made | {k: sample[k] for k in ("text", "tokens") if k in sample}


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents."""
    length = torch.tensor([len(s["features"]) for s in samples])
    features = torch.zeros(len(samples), int(length.max()), samples[0]["features"].shape[1])
    for row, s in zip(features, samples, strict=True):
        row[: len(s["features"])] = torch.from_numpy(s["features"])
    batch: dict[str, Any] = {
        "features": features, "length": length, "seconds": torch.tensor([s["seconds"] for s in samples]),
        "notes": [s["notes"] for s in samples], "id": [s["id"] for s in samples],
    }  # fmt: skip
    if "tokens" in samples[0]:
        size = torch.tensor([len(s["tokens"]) for s in samples])
        tokens = torch.zeros(len(samples), max(1, int(size.max())), dtype=torch.int64)
        for row, s in zip(tokens, samples, strict=True):
            row[: len(s["tokens"])] = torch.tensor(s["tokens"])
        batch |= {"tokens": tokens, "token_length": size, "text": [s["text"] for s in samples]}
    return batch


def write_folder(data: Data, root: str | Path) -> Path:
    """Write recordings in memory as the folders that `read` takes: root/train/name.wav and name.txt, root/val/..."""
    root = Path(root)
    for split, dataset in data.splits.items():
        folder = root / split
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(len(dataset)):
            s = dataset[i]
            sound.save(folder / f"{i:05d}.wav", s["audio"], s["rate"])
            (folder / f"{i:05d}.txt").write_text(s["text"], encoding="utf-8")
    return root
