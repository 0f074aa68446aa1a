"""Reading trajectories that people have, with or without their equations.

name.npz     t [steps] or [n, steps]; u [n, steps], [n, steps, dims], (a PDE's field) [n, steps, grid, dims] or (a fluid's, square)
             [n, steps, y, x, dims]; perhaps equation [n] and guess [n]
name.json    a list of {"t": [...], "u": [[...], ...], "equation": "...", "guess": "...", "id": "..."} (or one a line: .jsonl)
name.csv     columns id, t, u_0, u_1, ... and perhaps equation: one row a time
A folder holds any of these; train.* and val.* (or test.*) are splits, else a fifth is held out by the seed.
Equations are prefix words (`symbols.py`), components divided by |: "mul 0.5 u_0 | neg u_1". The first part of a trajectory is observed.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from formarium.errors import BadInput
from formarium.task import Data, Sample
from formarium.tasks.operator_learning.symbols import (
    PLACEHOLDER,
    SPECIAL,
    disturb,
    divided,
    fluid_vocabulary,
    parse,
    read_words,
    skeleton,
    to_ids,
    vocabulary,
)

FORMATS = (".npz", ".json", ".jsonl", ".csv")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Trajectories:
    """Raw samples: t float64 [steps], u float64 [steps, channels], input_len, dims, words and guess (prefix words), id.

    seen: what is observed, where that is noisier than u: float64 [input_len, channels].
    """

    samples: list[Sample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def read(
    path: str | Path,
    *,
    strict: bool = False,
    input_len: int | None = None,
    precision: int = 2,
    holdout: float = 0.2,
    seed: int = 0,
) -> Data:
    """The trajectories of a file or folder.

    input_len: how many steps are observed (default a third). precision: digits behind the first in the equations' numbers.
    strict: refuse trajectories whose equation is unknown, too.
    Raises BadInput: no such path, no trajectories, NaN, times that don't rise, another number of steps or dimensions than the first's, an
    equation with an unknown symbol, without its arguments or of another number of components.
    """
    root = Path(path)
    if not root.exists():
        raise BadInput(str(path), expected="a file or folder of trajectories", got="no such path")
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.suffix.lower() in FORMATS)
    if not files or files[0].suffix.lower() not in FORMATS:
        raise BadInput(str(path), expected=f"trajectories ({', '.join(FORMATS)})", got=root.suffix or "none in it")
    found: dict[str, list[Sample]] = {}
    for file in files:
        split = _SPLITS.get(file.stem.lower()) or _SPLITS.get(file.parent.name.lower() if file.parent != root else "") or "all"
        found.setdefault(split, []).extend(_load(file))
    every = [s for samples in found.values() for s in samples]
    if not every:
        raise BadInput(str(path), expected="at least one trajectory", got="none")
    shape = every[0]["u"].shape
    steps = input_len if input_len is not None else max(1, shape[0] // 3)
    if not 1 <= steps < shape[0]:
        raise BadInput("input_len", expected=f"from 1 to {shape[0] - 1}, fewer than the steps", got=str(steps))
    dims, plane = shape[-1], bool(every[0].get("plane"))
    words = fluid_vocabulary() if plane else vocabulary(dims, precision)
    for s in every:
        if s["u"].shape != shape:
            raise BadInput(
                s["id"], expected=f"{shape[0]} steps of {shape[1:]} as the first has", got=f"{s['u'].shape[0]} of {s['u'].shape[1:]}"
            )
        s |= complete(s, steps, precision + 1)
        if strict and not s["words"]:
            raise BadInput(s["id"], expected="its equation", got="none")
        for what in ("words", "guess"):
            to_ids(s[what], words, f"{s['id']}: {'equation' if what == 'words' else what}")
    if "train" not in found or len(found) == 1:
        order = np.random.default_rng(seed).permutation(len(every))
        if len(every) < 2:
            raise BadInput(str(path), expected="at least two trajectories, one to train on and one to test on", got="one")
        held = {*order[: max(1, round(holdout * len(every)))].tolist()}
        found = {"train": [s for i, s in enumerate(every) if i not in held], "val": [s for i, s in enumerate(every) if i in held]}
    found.setdefault("val", found.get("test", found.get("all", [])))
    unknown = sum(not s["words"] for s in every)
    notes = [f"{unknown} of {len(every)} trajectories have no equation: only their solutions are learned"] if unknown else []
    splits: dict[str, Any] = {name: Trajectories(samples) for name, samples in found.items() if name in ("train", "val", "test")}
    grid = {"grid": shape[1]} if len(shape) == 3 else {}  # points, of a square all of them
    return Data(root.stem, "operator-learning", splits, {"vocabulary": words, "dims": dims, **grid}, (), notes, {"path": str(path)})


def complete(sample: Sample, input_len: int, digits: int) -> Sample:
    """What a raw sample holds beside t and u: input_len, dims, words and guess, read from text. BadInput for equations that are none."""
    name, dims = sample["id"], sample["u"].shape[-1]
    words = read_words(sample.get("equation") or [], digits, f"{name}: equation") if sample.get("equation") else []
    if words and sample["u"].ndim == 2 and len(parse(divided(words)[0])) != dims:
        raise BadInput(f"{name}: equation", expected=f"{dims} components divided by |", got=str(len(parse(words))))
    if sample.get("guess"):
        guess = read_words(sample["guess"], digits, f"{name}: guess")
        guess = guess if sample.get("plane") else skeleton(guess)  # a fluid's numbers are given, PROSE-FD writes none
    else:
        guess = skeleton(words) if words else [SPECIAL[PLACEHOLDER]]
    return {"input_len": input_len, "dims": dims, "words": words, "guess": guess}


# files --------------------------------------------------------------------------------------------------------------


def _load(file: Path) -> list[Sample]:
    try:
        raw = {".npz": _npz, ".json": _json, ".jsonl": _jsonl, ".csv": _csv}[file.suffix.lower()](file)
    except BadInput:
        raise
    except Exception as e:  # whatever a broken file makes a parser raise
        raise BadInput(
            str(file), expected="a file of trajectories", got=f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        ) from None
    return [checked(s, f"{file.name}/{s.get('id', i)}") for i, s in enumerate(raw)]


def checked(sample: Mapping[str, Any], name: str) -> Sample:
    """t float64 [steps] and u float64 [steps, dims] (or [steps, grid, dims]) of a trajectory. BadInput where they can't be."""
    try:
        t, u = (np.asarray(sample[k], dtype=np.float64) for k in ("t", "u"))
    except KeyError as e:
        raise BadInput(name, expected="t and u", got=f"no {e.args[0]}") from None
    except (ValueError, TypeError):
        raise BadInput(
            name, expected="t [steps] and u [steps, dims], numbers, every step as long as the others", got="something else"
        ) from None
    u = u[:, None] if u.ndim == 1 else u
    plane = u.ndim == 4
    if plane:
        if u.shape[1] != u.shape[2]:
            raise BadInput(name, expected="square fields [steps, y, x, dims]", got=f"u {[*u.shape]}")
        u = u.reshape(len(u), -1, u.shape[-1])
    if t.ndim != 1 or u.ndim not in (2, 3) or len(t) != len(u):
        raise BadInput(name, expected="as many states in u as times in t", got=f"t {[*t.shape]}, u {[*u.shape]}")
    if len(t) < 2:
        raise BadInput(name, expected="at least two steps", got=str(len(t)))
    for what, values in (("t", t), ("u", u)):
        if not np.isfinite(values).all():
            raise BadInput(
                f"{name}: {what}", expected="finite values", got=f"{int((~np.isfinite(values)).sum())} NaN or infinite of {values.size}"
            )
    if not (np.diff(t) > 0).all():
        raise BadInput(f"{name}: t", expected="times that rise", got=f"{t[1:][np.diff(t) <= 0][0]:g} after {t[:-1][np.diff(t) <= 0][0]:g}")
    return {**sample, "t": t, "u": u, "id": name, **({"plane": True} if plane else {})}


def _npz(file: Path) -> list[dict[str, Any]]:
    with np.load(file, allow_pickle=False) as held:
        arrays = {k: held[k] for k in held.files}
    if "u" not in arrays or "t" not in arrays:
        raise BadInput(str(file), expected="arrays t and u", got=", ".join(arrays) or "none")
    t, u = arrays["t"], arrays["u"]
    if u.ndim < 2:
        raise BadInput(str(file), expected="u [trajectories, steps, dims]", got=f"u {[*u.shape]}")
    out = []
    for i in range(len(u)):
        sample: dict[str, Any] = {"t": t if t.ndim == 1 else t[i], "u": u[i]}
        sample |= {k: str(arrays[k][i]) for k in ("equation", "guess", "id") if k in arrays}
        out.append(sample)
    return out


def _json(file: Path) -> list[dict[str, Any]]:
    held = json.loads(file.read_text(encoding="utf-8"))
    held = held.get("trajectories", [held]) if isinstance(held, dict) else held
    if not isinstance(held, list) or not all(isinstance(s, dict) for s in held):
        raise BadInput(str(file), expected='a list of {"t": ..., "u": ...}', got=type(held).__name__)
    return held


def _jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _csv(file: Path) -> list[dict[str, Any]]:
    with file.open(newline="", encoding="utf-8") as f:
        rows = [*csv.DictReader(f)]
    columns = sorted((c for c in (rows[0] if rows else {}) if c.startswith("u_") and c[2:].isdigit()), key=lambda c: int(c[2:]))
    if not rows or "t" not in rows[0] or not columns:
        raise BadInput(str(file), expected="columns t, u_0, u_1, ...", got=", ".join(rows[0]) if rows else "no rows")
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, 2):
        own = found.setdefault(row.get("id") or "0", {"t": [], "u": [], **{k: row[k] for k in ("equation", "guess", "id") if row.get(k)}})
        try:
            own["t"].append(float(row["t"]))
            own["u"].append([float(row[c]) for c in columns])
        except (ValueError, TypeError):
            raise BadInput(
                f"{file.name} line {number}", expected="numbers in t and u_0 ...", got=str([row["t"], *(row[c] for c in columns)])
            ) from None
    return [*found.values()]


# unlabelled ---------------------------------------------------------------------------------------------------------


def inputs(paths: Sequence[str | Path]) -> Trajectories:
    """Trajectories of files and folders; the first third of each is observed, and what is known behind it is what is asked for."""
    files: list[Path] = []
    for entry in map(Path, paths):
        inside = sorted(f for f in entry.rglob("*") if f.suffix.lower() in FORMATS) if entry.is_dir() else [entry]
        if not inside or not inside[0].exists() or inside[0].suffix.lower() not in FORMATS:
            raise BadInput(
                str(entry), expected=f"trajectories ({', '.join(FORMATS)})", got="no such path" if not entry.exists() else "none in it"
            )
        files += inside
    samples = [s for f in files for s in _load(f)]
    if not samples:
        raise BadInput("trajectories", expected="at least one", got="none")
    return Trajectories([s | complete(s, max(1, len(s["t"]) // 3), 3) for s in samples])


def from_memory(value: Any, index: int) -> Sample:
    """A raw sample of a dict with t and u (and perhaps query times, equation, guess, input_len)."""
    if not isinstance(value, Mapping):
        raise BadInput(f"input {index}", expected='a dict with "t" and "u"', got=type(value).__name__)
    sample = checked(value, str(value.get("id", f"input {index}")))
    length = len(sample["t"]) if "query" in sample else max(1, len(sample["t"]) // 3)
    return sample | complete(sample, int(value.get("input_len", length)), 3)


# batches ------------------------------------------------------------------------------------------------------------


@dataclass
class Prepare:
    """A raw sample to what a batch holds.

    In training a recipe's `noise` adds Gaussian noise of that share of the observed values' norm; with `noise_targets` it is drawn over the
    whole trajectory, of that share of its norm, so that what is to be learned is noisy, too (PROSE's released trainers do that). `add_term`
    and `drop_term` are the chances that the guess has a term too many or too few.
    """

    preprocessing: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        n, recipe = sample["input_len"], self.recipe or {}
        t, u = sample["t"], sample["u"].reshape(len(sample["t"]), -1)
        share, whole = recipe.get("noise", 0.0), bool(recipe.get("noise_targets"))
        if share and whole:
            u = noisy(u, share, rng)
        seen = np.array(sample["seen"] if "seen" in sample and not share else u[:n], dtype=np.float64).reshape(n, -1)
        if share and not whole:
            seen = noisy(seen, share, rng)
        guess = sample["guess"]
        if sample["words"] and (recipe.get("add_term") or recipe.get("drop_term")):
            guess = disturb(skeleton(sample["words"]), rng, recipe.get("add_term", 0.0), recipe.get("drop_term", 0.0))
        out = {"data": np.concatenate([t[:n, None], seen], 1).astype(np.float32), "guess": guess, "words": sample["words"]}
        query = sample.get("query")
        out["query"] = np.asarray(t[n:] if query is None else query, dtype=np.float32).reshape(-1)
        if not len(out["query"]):
            raise BadInput(sample["id"], expected="times behind the observed ones, or query times", got="none")
        if query is None:
            out["target"] = u[n:].astype(np.float32)
        return {**out, "id": sample["id"], "dims": sample["dims"], "width": sample["u"].shape[-1]}


def noisy(u: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """u with Gaussian noise whose norm is that share of u's."""
    drawn = rng.standard_normal(u.shape)
    return u + share * np.linalg.norm(u) / (np.linalg.norm(drawn) + 1e-6) * drawn


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents. ValueError for samples of unlike query times."""
    import torch

    steps, channels = max(len(s["data"]) for s in samples), max(s["data"].shape[1] for s in samples)
    dims = max(int(s.get("width") or s["dims"]) for s in samples)  # a sample may have room for more dimensions than its system has
    data = np.zeros((len(samples), steps, channels), dtype=np.float32)
    observed, there = np.zeros((len(samples), steps), dtype=bool), np.zeros((len(samples), dims), dtype=bool)
    for i, s in enumerate(samples):
        n, c = s["data"].shape
        data[i, :n, :c], observed[i, :n], there[i, : s["dims"]] = s["data"], True, True
    batch: dict[str, Any] = {"data": torch.from_numpy(data), "observed": torch.from_numpy(observed), "dims": torch.from_numpy(there)}
    batch["query"] = torch.from_numpy(np.stack([s["query"] for s in samples]))
    if all("target" in s for s in samples):
        padded = [np.pad(s["target"], ((0, 0), (0, channels - 1 - s["target"].shape[1]))) for s in samples]
        batch["target"] = torch.from_numpy(np.stack(padded))
    return batch | {k: [s[k] for s in samples] for k in ("guess", "words", "id")}
