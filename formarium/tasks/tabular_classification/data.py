"""Tables that people have: csv, tsv, parquet. Numbers, categories, dates, missing values; the class in one of the columns.

As a network for tables learns from a prior, not from one table, the "train" split of any data is the prior; the table is what it is
tested on: part of the rows labelled, the others asked for.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from formarium.errors import BadInput, MissingExtra
from formarium.task import Data, Sample
from formarium.tasks.tabular_classification.model import UNKNOWN
from formarium.tasks.tabular_classification.prior import Prior, draw

if TYPE_CHECKING:
    import pandas as pd

FORMATS = (".csv", ".tsv", ".txt", ".parquet", ".pq")
TARGETS = ("class", "label", "target", "y", "species", "outcome", "diagnosis")
CONTEXT = 1000  # labelled rows at most: what the published network was trained for
QUERIES = 500  # rows asked for at once
TABLES = 100_000  # different tables a training split draws, before it begins anew


@dataclass
class Drawn:
    """Tables of the prior by number: the same number, seed and prior give the same table. `first` sets splits apart."""

    prior: Prior
    size: int
    seed: int = 0
    first: int = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, self.first + index))
        x, label, context = draw(self.prior, rng)
        return {"x": x, "label": label, "context": context, "id": f"table {self.first + index}"}


@dataclass
class Tables:
    """Tables in memory, each a sample: x float32 [rows, features], label int64 [rows], context, id, class_names, categorical."""

    samples: list[Sample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


@dataclass
class Table:
    """A table as numbers: x float32 [rows, features], NaN where missing; label int64 [rows], -100 where missing."""

    x: np.ndarray
    label: np.ndarray
    names: list[str]  # of the classes
    columns: list[str]
    categorical: np.ndarray  # bool [features]
    notes: list[str]


def episodes(table: Table, held: np.ndarray, name: str, seed: int = 0, most: int = CONTEXT) -> tuple[Tables, list[str]]:
    """The held rows asked for, QUERIES at a time, each time with the other rows as the context (at most `most`, every class among them)."""
    rng = np.random.default_rng(seed)
    context, notes = np.flatnonzero(~held), []
    if len(context) > most:
        notes.append(f"{most} of {len(context)} labelled rows are used, chosen at random, as more than the network was trained for")
        context = _some_of_each(table.label, context, most, rng)
    samples: list[Sample] = []
    asked = np.flatnonzero(held)
    for start in range(0, len(asked), QUERIES):
        part = asked[start : start + QUERIES]
        rows = np.concatenate([context, part])
        place = f"{name} rows {part[0]}-{part[-1]}" if len(asked) > QUERIES else name
        samples.append({**_sample(table, rows, len(context)), "id": place, "row": part})
    return Tables(samples), notes


def _sample(table: Table, rows: np.ndarray, context: int) -> Sample:
    made = {"x": table.x[rows], "label": table.label[rows], "context": context}
    return {**made, "class_names": tuple(table.names), "categorical": table.categorical}


def _some_of_each(label: np.ndarray, rows: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """`most` of the rows, at least one of every class."""
    shuffled = rng.permutation(rows)
    first = [int(np.flatnonzero(label[shuffled] == c)[0]) for c in np.unique(label[shuffled])]
    order = [*first, *(i for i in range(len(shuffled)) if i not in {*first})]
    return shuffled[np.sort(order[:most])]


def held_out(label: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Bool [rows]: a share of every class with two rows or more; of a class with one row, none."""
    rng, held = np.random.default_rng(seed), np.zeros(len(label), dtype=bool)
    for c in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == c))
        if len(members) > 1:
            held[members[: min(len(members) - 1, max(1, round(share * len(members))))]] = True
    return held


# files --------------------------------------------------------------------------------------------------------------


def read(path: str | Path, *, target: str = "", holdout: float = 0.3, seed: int = 0) -> Data:
    """A table as data: "train" the prior, "val" the held-out rows with the others as context.

    target: the column with the classes; by default one that is called class, label, target ... (TARGETS), else the last one.
    holdout: the share of every class that is asked for. Raises BadInput: no such file, not a table, empty, no or one class, a target
    of measurements, no usable column.
    """
    frame = read_frame(path)
    table = to_table(frame, _target(frame, target, path), str(path))
    known = table.label != UNKNOWN
    if not known.all():
        table.notes.append(f"{(~known).sum()} rows without a class left out")
        table = Table(table.x[known], table.label[known], table.names, table.columns, table.categorical, table.notes)
    held = held_out(table.label, holdout, seed)
    if not held.any():
        raise BadInput(str(path), expected="a class with two rows or more", got="one row each")
    val, notes = episodes(table, held, Path(path).name, seed)
    prior = Prior()
    splits: dict[str, Any] = {"train": Drawn(prior, TABLES, seed), "val": val}
    options = {k: v for k, v in {"target": target, "holdout": holdout}.items() if v not in ("", 0.3)}
    source = {"path": str(path), **({"options": options} if options else {})}
    return Data(Path(path).name, "tabular-classification", splits, {}, table.names, [*table.notes, *notes], source)


def inputs(paths: Sequence[str | Path], target: str = "") -> Tables:
    """Tables to complete: in each file, the rows without a class are asked for and the others are the context. Two files of which the
    second has no class column are one table: the first is the context. Raises BadInput where nothing is labelled or nothing asked for."""
    import pandas as pd

    files = [f for p in paths for f in _files(p)]
    frames = [read_frame(f) for f in files]
    if len(frames) == 2:
        column = _target(frames[0], target, files[0])
        if column not in frames[1].columns:
            joined = pd.concat([frames[0].dropna(subset=[column]), frames[1]], ignore_index=True)
            return _to_complete(joined, column, files[1], len(joined) - len(frames[1]))
    samples: list[Sample] = []
    for file, frame in zip(files, frames, strict=True):
        samples += _to_complete(frame, _target(frame, target, file), file, 0).samples
    return Tables(samples)


def _to_complete(frame: pd.DataFrame, target: str, file: str | Path, first: int) -> Tables:
    table = to_table(frame, target, str(file))
    asked = table.label == UNKNOWN
    if not asked.any():
        raise BadInput(str(file), expected=f"rows whose {target!r} is empty, to be predicted", got="a class in every row")
    found = episodes(table, asked, Path(file).name)[0]
    for sample in found.samples:
        sample["row"] = sample["row"] - first
    return found


def _files(path: str | Path) -> list[str | Path]:
    if Path(path).is_dir():
        inside: list[str | Path] = [f for f in sorted(Path(path).iterdir()) if f.suffix.lower() in FORMATS]
        if not inside:
            raise BadInput(str(path), expected=f"a folder with tables ({', '.join(FORMATS)})", got="none in it")
        return inside
    if Path(path).exists():
        return [path]
    if hits := sorted(glob.glob(str(path), recursive=True)):
        return [*hits]
    raise BadInput(str(path), expected="a table, a folder or a glob", got="no such path")


def read_frame(path: str | Path) -> pd.DataFrame:
    """A file as a data frame. The separator of text files is found out. BadInput where it can't be read as a table."""
    file = Path(path)
    if not file.is_file():
        raise BadInput(str(path), expected="a table (.csv, .tsv, .parquet)", got="a folder" if file.is_dir() else "no such file")
    if file.suffix.lower() not in FORMATS:
        raise BadInput(str(path), expected=f"a table ({', '.join(FORMATS)})", got=f"a {file.suffix or 'nameless'} file")
    if not file.stat().st_size:
        raise BadInput(str(path), expected="a table", got="an empty file")
    try:
        import pandas as pd
    except ImportError:
        raise MissingExtra("pandas", "table") from None
    try:
        if file.suffix.lower() in (".parquet", ".pq"):
            frame = pd.read_parquet(file)
        else:
            frame = pd.read_csv(file, sep=_separator(file), skipinitialspace=True)
    except ImportError:
        raise MissingExtra("pyarrow", "table") from None
    except Exception as e:  # whatever a broken file makes a parser raise
        said = (str(e).splitlines() or [type(e).__name__])[0]
        raise BadInput(str(path), expected="a table", got=f"a file that can't be parsed: {said}") from None
    frame.columns = [str(c).strip() for c in frame.columns]
    if frame.empty or frame.shape[1] < 2:
        raise BadInput(str(path), expected="rows, and at least two columns", got=f"{len(frame)} rows and {frame.shape[1]} columns")
    return frame


def _separator(file: Path) -> str:
    """The likeliest separator: the one that stands most often in the first line."""
    with open(file, encoding="utf-8", errors="replace") as f:
        line = f.readline()
    return max(",;\t|", key=lambda s: (line.count(s), s == ","))


def _target(frame: pd.DataFrame, target: str, path: str | Path) -> str:
    if target and target not in frame.columns:
        raise BadInput(f"{path}, target {target!r}", expected=f"one of {_few([*frame.columns])}", got="no such column")
    by_name = [c for c in frame.columns if c.lower() in TARGETS]
    return target or (by_name[0] if by_name else frame.columns[-1])


def to_table(frame: pd.DataFrame, target: str, name: str = "table", classes: int = 50) -> Table:
    """A data frame as numbers. Text and categories get a number in the order of their names, dates are days; endless numbers are missing.

    Left out, with a note: columns that are empty, and text that is different in (nearly) every row. Raises BadInput where the target has
    no or one class, or more than `classes` different numbers with fractions, and where no column is left.
    """
    label, names = _labels(frame[target], target, name, classes)
    columns, kept, categorical, notes = [], [], [], []
    for column in frame.columns:
        if column == target:
            continue
        values, is_category, why = _numbers(frame[column])
        if values is None:
            notes.append(f"column {column!r} left out: {why}")
            continue
        if why:
            notes.append(f"column {column!r}: {why}")
        columns.append(values)
        kept.append(column)
        categorical.append(is_category)
    if not columns:
        raise BadInput(name, expected="at least one column of numbers or categories beside the class", got="; ".join(notes) or "none")
    return Table(np.stack(columns, 1).astype(np.float32), label, names, kept, np.array(categorical), notes)


def _labels(column: pd.Series, target: str, name: str, most: int) -> tuple[np.ndarray, list[str]]:
    import pandas as pd

    known = column.notna()
    values = column[known]
    if pd.api.types.is_float_dtype(values) and values.nunique() > most and (values % 1 != 0).any():
        raise BadInput(
            f"{name}, column {target!r}", expected="classes", got=f"{values.nunique()} different numbers", fix="name another target"
        )
    if pd.api.types.is_float_dtype(values) and (values % 1 == 0).all():
        values = values.astype("int64")  # whole numbers that came as floating point because some are missing
    found = sorted(values.unique(), key=lambda v: (isinstance(v, str), v))
    if len(found) < 2:
        got = f"one class: {found[0]}" if found else "no labelled row"
        raise BadInput(f"{name}, column {target!r}", expected="at least two classes", got=got)
    number = {v: i for i, v in enumerate(found)}
    label = np.full(len(column), UNKNOWN, dtype=np.int64)
    label[known.to_numpy()] = [number[v] for v in values]
    return label, [str(v) for v in found]


def _numbers(column: pd.Series) -> tuple[np.ndarray | None, bool, str]:
    """(float64 values or None, whether they are categories, a remark or why it can't be used)."""
    import pandas as pd

    if not column.notna().any():
        return None, False, "empty"
    if pd.api.types.is_bool_dtype(column):
        return column.astype(float).to_numpy(), True, ""
    if pd.api.types.is_numeric_dtype(column):
        values = column.astype(float).to_numpy(dtype=float, na_value=np.nan)
        endless = np.isinf(values)
        large = np.abs(values) > 1e30
        return (
            np.where(endless | large, np.nan, values),
            False,
            f"{endless.sum()} infinite values count as missing" if endless.any() else "",
        )
    if pd.api.types.is_datetime64_any_dtype(column):
        days = (column.dt.tz_localize(None) - pd.Timestamp("2000-01-01")) / pd.Timedelta(days=1)
        return days.to_numpy(dtype=float), False, ""
    text = column.astype("string")
    found = sorted(text.dropna().unique())
    if len(found) > 20 and len(found) > 0.9 * text.notna().sum():
        return None, True, f"text that is different in {len(found)} of {text.notna().sum()} rows"
    codes = pd.Categorical(text, categories=found).codes.astype(float)
    return np.where(codes < 0, np.nan, codes), True, ""


def _few(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# samples to batches -------------------------------------------------------------------------------------------------


def from_memory(value: Any, index: int) -> Sample:
    """A table in memory: a data frame with empty classes, or a dict of x [rows, features], label [labelled rows] and perhaps class_names;
    rows of x beyond the labels are asked for."""
    name = f"input {index}"
    if hasattr(value, "columns") and hasattr(value, "iloc"):
        sample = _to_complete(value.rename(columns=str), _target(value.rename(columns=str), "", name), name, 0)
        if len(sample) > 1:
            raise BadInput(name, expected=f"at most {QUERIES} rows to predict", got=str(int(sum(len(s["row"]) for s in sample.samples))))
        return sample[0]
    if not isinstance(value, Mapping) or "x" not in value or "label" not in value:
        raise BadInput(name, expected="a data frame, or a dict with x and label", got=type(value).__name__)
    x, label = np.asarray(value["x"], dtype=np.float32), np.asarray(value["label"])
    if x.ndim != 2 or label.ndim != 1 or not x.size or len(label) > len(x) or not len(label):
        raise BadInput(name, expected="x [rows, features] and label [labelled rows]", got=f"{[*x.shape]} and {[*label.shape]}")
    if np.isinf(x).any():
        raise BadInput(name, expected="finite or missing values", got=f"{np.isinf(x).sum()} infinite ones")
    names, codes = np.unique(label, return_inverse=True)
    if len(names) < 2:
        raise BadInput(name, expected="at least two classes", got=f"one class: {names[0]}")
    full = np.concatenate([codes, np.full(len(x) - len(label), UNKNOWN)])
    known = {"x": x, "label": full, "context": int(value.get("context", len(label)))}
    return {"id": str(value.get("id", name)), **known, "class_names": tuple(value.get("class_names", map(str, names)))}


def is_single(value: Any) -> bool:
    """Whether a value in memory is one table."""
    return isinstance(value, Mapping) or hasattr(value, "iloc")


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents, padded to its longest and widest table."""
    import torch

    size, rows, columns = len(samples), max(len(s["x"]) for s in samples), max(s["x"].shape[1] for s in samples)
    x = np.zeros((size, rows, columns), dtype=np.float32)
    label = np.full((size, rows), UNKNOWN, dtype=np.int64)
    categorical = np.zeros((size, columns), dtype=bool)
    classes = []
    for i, s in enumerate(samples):
        n, f = s["x"].shape
        x[i, :n, :f], label[i, :n] = s["x"], s["label"]
        categorical[i, :f] = s.get("categorical", False)
        classes.append(max(len(s.get("class_names", ())), int(s["label"].max()) + 1, 1))
    batch: dict[str, Any] = {
        "x": torch.from_numpy(x),
        "label": torch.from_numpy(label),
        "context": torch.tensor([s["context"] for s in samples]),
        "rows": torch.tensor([len(s["x"]) for s in samples]),
        "features": torch.tensor([s["x"].shape[1] for s in samples]),
        "classes": torch.tensor(classes),
        "categorical": torch.from_numpy(categorical),
        "class_names": [tuple(s.get("class_names") or map(str, range(c))) for s, c in zip(samples, classes, strict=True)],
        "id": [s["id"] for s in samples],
    }
    if all("row" in s for s in samples):
        batch["row"] = [s["row"].tolist() for s in samples]
    return batch
