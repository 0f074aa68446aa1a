"""Reading time series that people have: UEA and UCR archives (.ts), numpy archives (.npz).

NAME_TRAIN.ts with NAME_TEST.ts beside it, or a folder that holds both      as given
one NAME.ts, or NAME.npz with x [series, channels, length] and y [series]   split by the seed, a part of every class held out
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from formarium.errors import BadInput, UnknownName
from formarium.task import Data, Sample

FORMATS = (".ts", ".npz")
LENGTHS = ("pad", "stretch", "cut")  # what is done with series of different lengths


@dataclass
class Series:
    """Series in memory, by index: series float32 [channels, length], label where there is one, id."""

    x: np.ndarray  # float32 [series, channels, length]
    labels: np.ndarray | None
    ids: list[str]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = {"series": self.x[index], "id": self.ids[index]}
        if self.labels is not None:
            sample["label"] = int(self.labels[index])
        return sample


@dataclass
class TsFile:
    """What a .ts file says: series as float64 arrays [channels, length], NaN where a value is missing; their classes as text (empty
    where the file has none); its header."""

    series: list[np.ndarray]
    classes: list[str]
    header: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The classes in the order of the header, else sorted."""
        told = self.header.get("classlabel", "false").split()
        return told[1:] if told[0].lower() == "true" and len(told) > 1 else sorted({*self.classes})


def read_ts(path: str | Path) -> TsFile:
    """A .ts file of the UEA and UCR archives: channels separated by colons, values by commas, the class behind the last colon; "?" or
    NaN for a missing value; (time,value) pairs are taken for their values. Raises BadInput naming the line that can't be understood."""
    header: dict[str, str] = {}
    series, classes, started = [], [], False
    with open(path, encoding="utf-8", errors="replace") as f:
        for number, raw in enumerate(f, 1):
            line = raw.strip()
            if not line or line.startswith(("#", "%")):
                continue
            if not started and line.startswith("@"):
                key, _, value = line[1:].partition(" ")
                started = key.lower() == "data"
                header[key.lower()] = value.strip()
                continue
            if not started:
                raise BadInput(f"{path}, line {number}", expected="a header line (@...) before @data", got=line[:40])
            try:
                channels, name = _line(line, header.get("classlabel", "true").lower().startswith("true"))
            except ValueError as e:
                raise BadInput(f"{path}, line {number}", expected="numbers, channels apart by ':'", got=str(e)) from None
            if series and len(channels) != len(series[0]):
                raise BadInput(f"{path}, line {number}", expected=f"{len(series[0])} channels", got=str(len(channels)))
            series.append(channels)
            classes.append(name)
    if not series:
        raise BadInput(str(path), expected="series behind @data", got="none" if started else "no @data line")
    return TsFile(series, classes, header)


def _line(line: str, labelled: bool) -> tuple[np.ndarray, str]:
    pieces = line.split(":")
    name = pieces.pop().strip() if labelled else ""
    if not pieces:
        raise ValueError("a class and no series" if labelled else "no series")
    channels = []
    for piece in pieces:
        if "(" in piece:
            piece = ",".join(re.findall(r"\([^,()]*,([^()]*)\)", piece))
        channels.append(np.array([np.nan if v.strip() in ("?", "") else float(v) for v in piece.split(",")]))
    longest = max(map(len, channels))
    return np.stack([np.pad(c, (0, longest - len(c)), constant_values=np.nan) for c in channels]), name


def write_ts(path: str | Path, x: Sequence[np.ndarray], labels: Sequence[int] | None, names: Sequence[str], name: str = "series") -> Path:
    """Series [channels, length] as a .ts file that `read_ts` and the archives' tools read; returns its path."""
    lengths = {s.shape[1] for s in x}
    missing = any(np.isnan(s).any() for s in x)
    clean = [re.sub(r"[\s:,]+", "_", str(n)) for n in names]
    lines = [
        f"@problemName {name}",
        "@timeStamps false",
        f"@missing {str(missing).lower()}",
        f"@univariate {str(len(x[0]) == 1).lower()}",
        f"@dimensions {len(x[0])}",
        f"@equalLength {str(len(lengths) == 1).lower()}",
        *([f"@seriesLength {next(iter(lengths))}"] if len(lengths) == 1 else []),
        f"@classLabel true {' '.join(clean)}" if labels is not None else "@classLabel false",
        "@data",
    ]
    for i, s in enumerate(x):
        channels = [",".join("?" if np.isnan(v) else repr(float(v)) for v in channel) for channel in s]
        lines.append(":".join([*channels, *([clean[labels[i]]] if labels is not None else [])]))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(path)


# data sets ----------------------------------------------------------------------------------------------------------


def read(path: str | Path, *, lengths: str = "pad", holdout: float = 0.3, seed: int = 0) -> Data:
    """The classes and splits of an archive's files; see the module's first lines.

    lengths: series of different lengths are padded with zeros to the longest ("pad"), stretched to it ("stretch"), or cut to the
        shortest ("cut"); a note says so. Missing values are filled in between their neighbours, with a note.
    Raises BadInput: no such file, another format, not understood, empty, one class, classes that only the test part has, a channel without
    a value.
    """
    if lengths not in LENGTHS:
        raise UnknownName("lengths", lengths, LENGTHS)
    parts = {split: _load(p) for split, p in _parts(Path(path)).items()}
    names = next(iter(parts.values())).names
    for split, part in parts.items():
        unknown = sorted({*part.classes} - {*names})
        if unknown or "" in part.classes:
            raise BadInput(f"{split} of {path}", expected=f"classes {', '.join(names[:8])}", got=", ".join(unknown) or "series without one")
    present = [n for n in names if any(n in part.classes for part in parts.values())]
    if len(present) < 2:
        raise BadInput(str(path), expected="at least two classes", got=f"one: {present[0]}")
    notes: list[str] = []
    every = [s for part in parts.values() for s in part.series]
    x = same_length(every, lengths, notes, str(path))
    label = np.array([present.index(c) for part in parts.values() for c in part.classes])
    if len(parts) == 2:
        cut = len(next(iter(parts.values())).series)
        rows = {"train": np.arange(cut), "val": np.arange(cut, len(x))}
        missing = [n for i, n in enumerate(present) if i not in label[:cut]]
        if missing:
            raise BadInput(f"train of {path}", expected="every class that the test part has", got=f"none of {', '.join(missing)}")
    else:
        rows = _split(label, present, holdout, seed)
    name = re.sub(r"_(TRAIN|TEST)$", "", Path(path).stem, flags=re.I)
    splits: dict[str, Any] = {k: Series(x[at], label[at], [f"{name} {k} {i}" for i in range(len(at))]) for k, at in rows.items()}
    options = {"lengths": lengths} if lengths != "pad" else {}
    source = {"path": str(path), **({"options": options} if options else {})}
    args = {"num_classes": len(present), "channels": x.shape[1], "length": x.shape[2]}
    return Data(name, "time-series-classification", splits, args, present, notes, source)


def _parts(path: Path) -> dict[str, Path]:
    """The files of a data set by split."""
    if path.is_dir():
        trains = sorted(p for p in path.iterdir() if re.fullmatch(r".*_TRAIN\.ts", p.name, re.I))
        if len(trains) != 1:
            got = f"{len(trains)} such files" if trains else "none in it"
            raise BadInput(str(path), expected="a folder with one NAME_TRAIN.ts and NAME_TEST.ts", got=got)
        path = trains[0]
    if not path.is_file():
        raise BadInput(str(path), expected="a file of series (.ts, .npz)", got="no such file")
    if path.suffix.lower() not in FORMATS:
        raise BadInput(str(path), expected=f"a file of series ({', '.join(FORMATS)})", got=f"a {path.suffix or 'nameless'} file")
    if match := re.fullmatch(r"(.*)_(TRAIN|TEST)(\.ts)", path.name, re.I):
        train, test = (path.with_name(f"{match[1]}_{part}{match[3]}") for part in ("TRAIN", "TEST"))
        if train.is_file() and test.is_file():
            return {"train": train, "val": test}
    return {"all": path}


def _load(path: Path) -> TsFile:
    if path.suffix.lower() == ".ts":
        return read_ts(path)
    try:
        with np.load(path, allow_pickle=False) as found:
            x, y = np.asarray(found["x"], dtype=np.float64), found["y"] if "y" in found.files else None
    except (OSError, ValueError, KeyError) as e:
        raise BadInput(str(path), expected="an archive with x [series, channels, length] and y", got=f"{type(e).__name__}: {e}") from None
    x = x[:, None] if x.ndim == 2 else x
    if x.ndim != 3 or not x.size or (y is not None and len(y) != len(x)):
        raise BadInput(str(path), expected="x [series, channels, length] and y [series]", got=f"x {[*x.shape]}")
    return TsFile([*x], [*map(str, y)] if y is not None else [""] * len(x))


def _split(label: np.ndarray, names: Sequence[str], holdout: float, seed: int) -> dict[str, np.ndarray]:
    rng, held = np.random.default_rng(seed), np.zeros(len(label), dtype=bool)
    for i, name in enumerate(names):
        members = rng.permutation(np.flatnonzero(label == i))
        if len(members) < 2:
            raise BadInput(f"class {name}", expected="at least two series, one to train on and one to test on", got=str(len(members)))
        held[members[: min(len(members) - 1, max(1, round(holdout * len(members))))]] = True
    return {"train": np.flatnonzero(~held), "val": np.flatnonzero(held)}


def same_length(series: Sequence[np.ndarray], lengths: str, notes: list[str], name: str) -> np.ndarray:
    """Series [channels, length] as one float32 array [series, channels, length]; what had to be done is added to the notes."""
    cleaned, filled = [], 0
    for i, s in enumerate(series):
        inside = s[:, : _end(s)]
        if inside.size == 0 or np.isnan(inside).all(1).any():
            raise BadInput(f"{name}, series {i + 1}", expected="values in every channel", got="a channel without any")
        filled += bool(np.isnan(inside).any())
        if np.isinf(inside).any():
            raise BadInput(f"{name}, series {i + 1}", expected="finite values", got=f"{np.isinf(inside).sum()} infinite ones")
        cleaned.append(_filled(inside))
    if filled:
        notes.append(f"missing values in {filled} series filled in between their neighbours")
    sizes = [s.shape[1] for s in cleaned]
    if min(sizes) != max(sizes):
        done = {"pad": "padded with zeros to", "stretch": "stretched to", "cut": "cut to"}[lengths]
        target = min(sizes) if lengths == "cut" else max(sizes)
        notes.append(f"series of {min(sizes)} to {max(sizes)} points, {done} {target}")
        cleaned = [fit_length(s, target, lengths) for s in cleaned]
    return np.stack(cleaned).astype(np.float32)


def _end(s: np.ndarray) -> int:
    """How long a series is, without the missing values that end all of its channels."""
    known = np.flatnonzero(~np.isnan(s).all(0))
    return int(known[-1]) + 1 if len(known) else 0


def _filled(s: np.ndarray) -> np.ndarray:
    """Missing values on the line between their neighbours; at the ends, the nearest value."""
    if not np.isnan(s).any():
        return s
    time = np.arange(s.shape[1])
    return np.stack([np.interp(time, time[~np.isnan(c)], c[~np.isnan(c)]) for c in s])


def fit_length(s: np.ndarray, length: int, how: str) -> np.ndarray:
    """A series [channels, n] at another length: padded with zeros, stretched (linear), or cut."""
    if s.shape[1] >= length and how != "stretch":
        return s[:, :length]
    if how == "pad":
        return np.pad(s, ((0, 0), (0, length - s.shape[1])))
    at = np.linspace(0, s.shape[1] - 1, length)
    return np.stack([np.interp(at, np.arange(s.shape[1]), c) for c in s])


# unlabelled ---------------------------------------------------------------------------------------------------------


def inputs(paths: Sequence[str | Path]) -> Series:
    """All series of files, folders and globs (their classes aren't looked at). BadInput for what isn't there or has other lengths."""
    files: list[Path] = []
    for entry in paths:
        p = Path(entry)
        if p.is_dir():
            inside = [f for f in sorted(p.iterdir()) if f.suffix.lower() in FORMATS]
            if not inside:
                raise BadInput(str(entry), expected="a folder with series (.ts, .npz)", got="none in it")
            files += inside
        elif p.is_file():
            files.append(p)
        elif hits := sorted(glob.glob(str(entry), recursive=True)):
            files += map(Path, hits)
        else:
            raise BadInput(str(entry), expected="a file of series, a folder or a glob", got="no such path")
    loaded = []
    for f in files:
        if f.suffix.lower() not in FORMATS:
            raise BadInput(str(f), expected=f"a file of series ({', '.join(FORMATS)})", got=f"a {f.suffix or 'nameless'} file")
        loaded.append(_load(f))
    if len({len(part.series[0]) for part in loaded}) > 1:
        raise BadInput(
            "files",
            expected="one number of channels",
            got=", ".join(f"{f.name}: {len(p.series[0])}" for f, p in zip(files, loaded, strict=True)),
        )
    ids = [f"{f.stem} {i}" for f, part in zip(files, loaded, strict=True) for i in range(len(part.series))]
    return Series(same_length([s for part in loaded for s in part.series], "pad", [], str(files[0])), None, ids)


def is_single(value: Any) -> bool:
    """Whether a value in memory is one series: a dict, or an array [channels, length] or [length]."""
    return isinstance(value, Mapping) or (hasattr(value, "ndim") and value.ndim < 3)


def from_memory(value: Any, index: int) -> Sample:
    """A raw sample of an array or tensor [channels, length] or [length]. BadInput for NaN, infinite values, other shapes."""
    name = f"input {index}"
    extra: dict[str, Any] = {}
    if isinstance(value, Mapping):
        if "series" not in value:
            raise BadInput(name, expected="a dict with series", got=", ".join(map(str, value)) or "an empty one")
        extra, value = {k: v for k, v in value.items() if k != "series"}, value["series"]
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        x = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise BadInput(name, expected="numbers [channels, length]", got=type(value).__name__) from None
    x = x[None] if x.ndim == 1 else x
    if x.ndim != 2 or not x.size:
        raise BadInput(name, expected="a series [channels, length]", got=f"{[*x.shape]}")
    if not np.isfinite(x).all():
        raise BadInput(name, expected="finite values", got=f"{(~np.isfinite(x)).sum()} NaN or infinite of {x.size}")
    return {"id": name, **extra, "series": x}


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents. Series of different lengths or channels can't share one (ValueError, as numpy says it)."""
    import torch

    batch: dict[str, Any] = {
        "series": torch.from_numpy(np.stack([s["series"] for s in samples])),
        "id": [s["id"] for s in samples],
    }
    if "label" in samples[0]:
        batch["label"] = torch.tensor([s["label"] for s in samples], dtype=torch.int64)
    return batch
