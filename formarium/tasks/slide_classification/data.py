"""Reading slides that people have: one file of tile features a slide, or one folder of tile images a slide, and a table of labels.

folder/labels.csv (or .parquet; the only table in the folder will do)     columns: slide, label, and if there: split, patient
folder/[...]/NAME.npz | .npy | .h5 | .pt                                  features of the slide called NAME
folder/[...]/NAME/*.png                                                   tile images of the slide called NAME (X_Y in their names)

npz and h5 hold `features` [tiles, width] and, where known, `coords` [tiles, 2]; npy a matrix; pt a matrix or a dict of those, read with
weights_only. Without a table, features may lie in folders by class: folder/CLASS/NAME.npz.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from formarium.errors import BadInput, MissingExtra
from formarium.task import Data, Sample
from formarium.tasks.image_classification.data import FORMATS, decode

FEATURES = (".npz", ".npy", ".h5", ".hdf5", ".pt", ".pth")
TABLES = (".csv", ".tsv", ".parquet")
SLIDE = ("slide", "slide_id", "slide_name", "id", "image_id", "filename", "file", "name")
LABEL = ("label", "target", "class", "y")
PATIENT = ("patient", "patient_id", "case_id", "case")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Bags:
    """Slides by index. A sample holds features (float32 [tiles, width]) or tiles (uint8 [tiles, height, width, 3]), coords (float32
    [tiles, 2]), id and, where known, label and patient."""

    paths: list[Path]
    ids: list[str]
    labels: list[int] | None = None
    patients: list[str] | None = None
    metadata: int = 0  # leading columns of the matrices that are no features (level, x, y)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        sample = {**read_bag(self.paths[index], self.metadata), "id": self.ids[index]}
        if self.labels is not None:
            sample["label"] = self.labels[index]
        if self.patients is not None:
            sample["patient"] = self.patients[index]
        return sample


@dataclass
class Arrays:
    """Slides in memory: lists of what a sample holds."""

    samples: list[Sample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


# one bag ------------------------------------------------------------------------------------------------------------


def read_bag(path: Path, metadata: int = 0) -> Sample:
    """One slide's features or tiles. Raises BadInput for a file that holds no bag."""
    if path.is_dir():
        return read_tiles(path)
    try:
        values = dict(_arrays(path))
    except (BadInput, MissingExtra):
        raise
    except Exception as e:  # whatever a broken file makes its reader raise
        raise BadInput(str(path), expected="a file of tile features", got=f"one that can't be read ({type(e).__name__})") from None
    key = next((k for k in ("features", "feats", "x", "embeddings", "arr_0") if k in values), next(iter(values), ""))
    if key not in values:
        raise BadInput(str(path), expected="an array of features", got="none")
    x = np.asarray(values[key])
    if x.ndim == 3 and x.shape[0] == 1:
        x = x[0]
    if x.ndim != 2 or not x.size or not np.issubdtype(x.dtype, np.number):
        raise BadInput(f"{key!r} in {path}", expected="features [tiles, width], not empty", got=f"{x.dtype} {[*x.shape]}")
    if metadata >= x.shape[1]:
        raise BadInput("metadata", expected=f"fewer columns than the {x.shape[1]} there are", got=str(metadata))
    coords = next((np.asarray(values[k]) for k in ("coords", "coordinates", "xy") if k in values), None)
    if coords is None and metadata >= 2:
        coords = x[:, metadata - 2 : metadata]
    x = x[:, metadata:].astype(np.float32)
    if not np.isfinite(x).all():
        raise BadInput(f"{key!r} in {path}", expected="finite features", got=f"{int((~np.isfinite(x)).sum())} NaN or infinite values")
    return {"features": x, "coords": _coords(coords, len(x), path)}


def _coords(coords: np.ndarray | None, tiles: int, path: Any) -> np.ndarray:
    if coords is None:
        return np.zeros((tiles, 2), dtype=np.float32)
    if coords.ndim != 2 or coords.shape[0] != tiles or coords.shape[1] < 2:
        raise BadInput(f"coords in {path}", expected=f"[{tiles}, 2]", got=f"{[*coords.shape]}")
    return coords[:, :2].astype(np.float32)


def _arrays(path: Path) -> Mapping[str, Any]:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as z:
            return {k: z[k] for k in z.files}
    if suffix == ".npy":
        return {"features": np.load(path, allow_pickle=False)}
    if suffix in (".h5", ".hdf5"):
        try:
            import h5py
        except ImportError:
            raise BadInput(str(path), expected="h5py, to read it with", got="not installed", fix="pip install h5py") from None
        with h5py.File(path, "r") as f:
            return {k: v[()] for k, v in f.items() if isinstance(v, h5py.Dataset)}
    if suffix in (".pt", ".pth"):
        import torch

        found = torch.load(path, map_location="cpu", weights_only=True)
        found = found if isinstance(found, Mapping) else {"features": found}
        return {k: v.float().numpy() for k, v in found.items() if torch.is_tensor(v)}
    raise BadInput(str(path), expected=f"one of {', '.join(FEATURES)}", got=suffix or "no ending")


def read_tiles(folder: Path) -> Sample:
    """A folder of tile images of one size. Two numbers in a name (10_20.png, x10_y20.png) are the tile's place."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in FORMATS and not f.name.startswith("."))
    if not files:
        raise BadInput(str(folder), expected=f"tile images ({', '.join(FORMATS[:4])}, ...)", got="none")
    tiles, coords = [], np.zeros((len(files), 2), dtype=np.float32)
    for i, file in enumerate(files):
        try:
            tiles.append(decode(file))
        except Exception as e:
            raise BadInput(str(file), expected="an image that decodes", got=type(e).__name__) from None
        numbers = re.findall(r"\d+", file.stem)
        if len(numbers) >= 2:
            coords[i] = [float(n) for n in numbers[-2:]]
    shapes = {t.shape for t in tiles}
    if len(shapes) > 1:
        raise BadInput(str(folder), expected="tiles of one size", got=", ".join(f"{h}x{w}" for h, w, _ in sorted(shapes)[:3]))
    return {"tiles": np.stack(tiles), "coords": coords}


# a folder -----------------------------------------------------------------------------------------------------------


def read(
    path: str | Path, *, strict: bool = False, holdout: float = 0.25, seed: int = 0, labels: str | Path | None = None, metadata: int = 0
) -> Data:
    """The slides under a folder and their labels.

    labels: the table, where it lies elsewhere. holdout: the share of the patients (else slides) of every class that becomes "val" where
    there is no split column. metadata: leading columns of feature matrices that are no features (3 in Owkin's files: level, x, y).
    strict: fail on slides without label or file, rather than leave them out and name them in `notes`.
    Raises BadInput: no such folder, no slides, no table, no such column, one class, features of several widths.
    """
    root = Path(path)
    if not root.exists():
        raise BadInput(str(path), expected="a folder of slides", got="no such path")
    if not root.is_dir():
        raise BadInput(str(path), expected="a folder of slides with a table of labels", got="a file", fix="give the folder")
    bags = find_bags(root)
    if not bags:
        raise BadInput(str(path), expected=f"slides: files of features ({', '.join(FEATURES)}) or folders of tile images", got="none")
    table = _table_of(root, labels)
    rows, notes = _by_table(table, bags, strict) if table is not None else (_by_folder(root, bags), [])
    names = sorted({r["label"] for r in rows})
    if len(names) < 2:
        raise BadInput(str(path), expected="at least two classes", got=f"one: {names[0]}" if names else "none")
    if "split" not in rows[0]:
        _split(rows, holdout, seed)
    splits: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        own = [r for r in rows if r["split"] == split]
        if own:
            patients = [r["patient"] for r in own] if "patient" in own[0] else None
            index = [names.index(r["label"]) for r in own]
            splits[split] = Bags([r["path"] for r in own], [r["id"] for r in own], index, patients, metadata)
    if "train" not in splits or "val" not in splits:
        raise BadInput("split column", expected="train and val slides", got=", ".join(splits) or "neither")
    args: dict[str, Any] = {"num_classes": len(names), "features": _width(splits, metadata)}
    source = {"path": str(path), **({"options": {"metadata": metadata}} if metadata else {})}
    return Data(root.name, "slide-classification", splits, args, names, notes, source)


def find_bags(root: Path) -> dict[str, Path]:
    """Slide name -> its file of features, or its folder of tile images, anywhere below."""
    files = {p.stem: p for p in sorted(root.rglob("*")) if p.suffix.lower() in FEATURES and p.is_file()}
    if files:
        return files
    folders = sorted({p.parent for p in root.rglob("*") if p.suffix.lower() in FORMATS and p.is_file() and p.parent != root})
    return {p.name: p for p in folders}


def _table_of(root: Path, labels: str | Path | None) -> Any:
    import pandas as pd

    if labels is not None:
        path = Path(labels)
        if not path.is_file():
            raise BadInput(str(labels), expected="a table of labels", got="no such file")
    else:
        found = [p for p in sorted(root.iterdir()) if p.suffix.lower() in TABLES]
        named = [p for p in found if p.stem.lower() in ("labels", "label", "slides", "clinical")]
        if not found:
            return None
        if not named and len(found) > 1:
            raise BadInput(str(root), expected="one table of labels", got=", ".join(p.name for p in found), fix="call it labels.csv")
        path = (named or found)[0]
    try:
        if path.suffix.lower() == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",", dtype=str)
    except Exception as e:
        raise BadInput(str(path), expected="a table", got=f"one that can't be read ({type(e).__name__})") from None


def _column(table: Any, known: Sequence[str], needed: bool) -> str:
    lower = {str(c).lower(): c for c in table.columns}
    found = next((lower[k] for k in known if k in lower), None)
    if found is None and needed:
        expected = f"a column {known[0]!r} (or {', '.join(known[1:4])})"
        raise BadInput("table of labels", expected=expected, got=", ".join(map(str, table.columns)))
    return found or ""


def _by_table(table: Any, bags: Mapping[str, Path], strict: bool) -> tuple[list[dict[str, Any]], list[str]]:
    slide, label = _column(table, SLIDE, True), _column(table, LABEL, True)
    patient, split = _column(table, PATIENT, False), _column(table, ("split", "set", "fold"), False)
    rows, missing, unlabelled, seen = [], [], [], set()
    for _, entry in table.iterrows():
        raw = str(entry[slide])
        name = raw if raw in bags else Path(raw).stem
        if name not in bags:
            missing.append(raw)
            continue
        if entry[label] is None or entry[label] != entry[label] or str(entry[label]) == "":
            unlabelled.append(raw)
            continue
        if name in seen:
            raise BadInput("table of labels", expected="each slide once", got=f"{name} twice")
        seen.add(name)
        row: dict[str, Any] = {"id": name, "path": bags[name], "label": str(entry[label])}
        if patient:
            row["patient"] = str(entry[patient])
        if split:
            said = str(entry[split]).lower()
            if said not in SPLITS:
                raise BadInput(f"split of {name}", expected="train, val or test", got=said)
            row["split"] = SPLITS[said]
        rows.append(row)
    spare = [b for b in bags if b not in seen and b not in {*unlabelled}]
    left_out = (("slides of the table without a file", missing), ("slides without label", unlabelled), ("files not in the table", spare))
    notes = [f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" for what, names in left_out if names]
    if strict and notes:
        raise BadInput("slides", expected="a label and a file for each", got="; ".join(notes))
    if not rows:
        expected = f"names of the slides there are ({', '.join([*bags][:3])}, ...)"
        raise BadInput("table of labels", expected=expected, got=", ".join(missing[:3]))
    return rows, notes


def _by_folder(root: Path, bags: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Labels by the folder that a slide lies in."""
    depth = {len(p.relative_to(root).parts) for p in bags.values()}
    if 1 in depth:
        raise BadInput(str(root), expected="labels.csv, or slides in folders by class", got="neither")
    return [{"id": name, "path": p, "label": p.relative_to(root).parts[0]} for name, p in bags.items()]


def _split(rows: list[dict[str, Any]], holdout: float, seed: int) -> None:
    """Adds the splits: whole patients, class by class."""
    rng = np.random.default_rng(seed)
    owner = {r.get("patient", r["id"]): r["label"] for r in rows}
    held = set()
    for label in sorted({*owner.values()}):
        own = sorted(o for o, value in owner.items() if value == label)
        if len(own) < 2:
            raise BadInput(f"class {label}", expected="at least two slides (of two patients), to train and to test on", got="one")
        held |= {own[i] for i in rng.permutation(len(own))[: max(1, round(holdout * len(own)))]}
    for r in rows:
        r["split"] = "val" if r.get("patient", r["id"]) in held else "train"


def _width(splits: Mapping[str, Bags], metadata: int) -> int:
    """The features' width, 0 for tile images. It looks at the first and the last slide of each split."""
    seen = {}
    for bags in splits.values():
        for i in {0, len(bags) - 1}:
            if bags.paths[i].is_dir():
                seen[0] = bags.ids[i]
            else:
                seen[bags[i]["features"].shape[1]] = bags.ids[i]
    if len(seen) > 1:
        raise BadInput("features", expected="one width", got=", ".join(f"{w} in {name}" for w, name in seen.items()))
    return next(iter(seen))


def inputs(paths: Sequence[str | Path]) -> Bags:
    """Slides without labels: files of features, folders of tile images, or folders of those."""
    found: dict[str, Path] = {}
    for raw in paths:
        path = Path(raw)
        if not path.exists():
            raise BadInput(str(raw), expected="a slide or a folder of slides", got="no such path")
        if path.is_file():
            if path.suffix.lower() not in FEATURES:
                raise BadInput(str(raw), expected=f"one of {', '.join(FEATURES)}", got=path.suffix or "no ending")
            found[path.stem] = path
        elif any(f.suffix.lower() in FORMATS for f in path.iterdir() if f.is_file()):
            found[path.name] = path
        else:
            found |= find_bags(path)
    if not found:
        raise BadInput(", ".join(map(str, paths)), expected="slides", got="none")
    return Bags([*found.values()], [*found])


# in memory ----------------------------------------------------------------------------------------------------------


def is_single(value: Any) -> bool:
    return isinstance(value, Mapping) or (hasattr(value, "ndim") and value.ndim in (2, 4))


def from_memory(value: Any, index: int) -> Sample:
    """A bag: features [tiles, width], tile images [tiles, height, width, 3] (uint8, or floats in [0, 1]), or a sample as a dict."""
    name = f"input {index}"
    if isinstance(value, Mapping):
        sample = {"id": name, **value}
        x = np.asarray(sample.get("features", sample.get("tiles", ())))
    else:
        x = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
        sample = {"id": name, "features" if x.ndim == 2 else "tiles": x}
    if x.ndim not in (2, 4) or not x.size or (x.ndim == 4 and x.shape[3] != 3):
        raise BadInput(name, expected="features [tiles, width] or images [tiles, height, width, 3]", got=f"{[*x.shape]}")
    if not np.isfinite(x).all():
        raise BadInput(name, expected="finite values", got="NaN or infinite ones")
    if x.ndim == 4 and x.dtype != np.uint8:
        if x.min() < 0 or x.max() > 1:
            raise BadInput(name, expected="uint8, or floats in [0, 1]", got=f"{x.dtype} from {x.min():.3g} to {x.max():.3g}")
        x = (x * 255).round().astype(np.uint8)
    sample["features" if x.ndim == 2 else "tiles"] = x.astype(np.float32) if x.ndim == 2 else x
    sample["coords"] = _coords(None if "coords" not in sample else np.asarray(sample["coords"]), len(x), name)
    return sample


# batches ------------------------------------------------------------------------------------------------------------


class Prepare:
    """A raw sample to what `collate` takes: tiles resized to preprocessing["size"] and scaled to [0, 1].

    In training (with a recipe) at most tiles_per_slide random tiles; turns: whether each tile is turned by a random multiple of 90 degrees
    and mirrored.
    """

    def __init__(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None):
        self.size = int(preprocessing.get("size", 224))
        self.training, recipe = recipe is not None, recipe or {}
        self.most, self.turns = recipe.get("tiles_per_slide"), bool(recipe.get("turns", False))
        if self.most is not None and self.most < 1:
            raise BadInput("tiles_per_slide", expected="at least 1", got=str(self.most))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        key = "features" if "features" in sample else "tiles"
        x, coords = sample[key], sample.get("coords", np.zeros((len(sample[key]), 2), dtype=np.float32))
        if self.training and self.most is not None and len(x) > self.most:
            chosen = np.sort(rng.permutation(len(x))[: self.most])
            x, coords = x[chosen], coords[chosen]
        if key == "tiles":
            x = self.tiles(x, rng)
        kept = {k: v for k, v in sample.items() if k in ("label", "id", "patient")}
        return {**kept, key: np.ascontiguousarray(x, dtype=np.float32), "coords": coords.astype(np.float32)}

    def tiles(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if x.shape[1:3] != (self.size, self.size):
            from PIL import Image

            resized = [Image.fromarray(t).resize((self.size, self.size), Image.Resampling.BICUBIC) for t in x]
            x = np.stack([np.asarray(t) for t in resized])
        if self.training and self.turns:
            turns, mirrored = rng.integers(0, 4, len(x)), rng.random(len(x)) < 0.5
            x = np.stack([np.rot90(t[:, ::-1] if m else t, k) for t, k, m in zip(x, turns, mirrored, strict=True)])
        return x.transpose(0, 3, 1, 2).astype(np.float32) / 255


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents; bags are padded with zeros to the longest."""
    import torch

    key = "features" if "features" in samples[0] else "tiles"
    if any(key not in s for s in samples):
        raise BadInput("slides", expected="all of one kind", got="features and tile images")
    if len({s[key].shape[1:] for s in samples}) > 1:
        raise BadInput("slides", expected="features of one width", got=", ".join(sorted({str(s[key].shape[1]) for s in samples})))
    longest = max(len(s[key]) for s in samples)
    batch: dict[str, Any] = {"id": [s["id"] for s in samples]}
    for name in (key, "coords"):
        padded = np.zeros((len(samples), longest, *samples[0][name].shape[1:]), dtype=np.float32)
        for row, s in zip(padded, samples, strict=True):
            row[: len(s[name])] = s[name]
        batch[name] = torch.from_numpy(padded)
    batch["mask"] = torch.arange(longest) < torch.tensor([len(s[key]) for s in samples])[:, None]
    if "label" in samples[0]:
        batch["label"] = torch.tensor([s["label"] for s in samples], dtype=torch.int64)
    if all("patient" in s for s in samples):
        batch["patient"] = [s["patient"] for s in samples]
    return batch


# writing ------------------------------------------------------------------------------------------------------------


def write_bags(data: Data, root: str | Path, extract: Any = None) -> Path:
    """Write slides as `read` takes them: root/NAME.npz (features) or root/NAME/X_Y.png (tile images), and root/labels.csv.

    extract: tiles uint8 [tiles, height, width, 3] -> features float [tiles, width], to write features instead of images.
    """
    import csv

    from PIL import Image

    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for split, dataset in data.splits.items():
        for i in range(len(dataset)):
            s = dataset[i]
            name = re.sub(r"[^\w.-]+", "-", str(s["id"]))
            if extract is not None or "features" in s:
                x = np.asarray(extract(s["tiles"]) if extract is not None and "tiles" in s else s["features"], dtype=np.float32)
                np.savez_compressed(root / f"{name}.npz", features=x, coords=s["coords"])
            else:
                (root / name).mkdir(exist_ok=True)
                for tile, (x, y) in zip(s["tiles"], s["coords"], strict=True):
                    Image.fromarray(tile).save(root / name / f"{int(x):05d}_{int(y):05d}.png")
            lines.append([name, data.names[s["label"]], split, s.get("patient", "")])
    with open(root / "labels.csv", "w", newline="", encoding="utf-8") as f:
        own = any(line[3] for line in lines)
        writer = csv.writer(f)
        writer.writerow(["slide", "label", "split", *(["patient"] if own else [])])
        writer.writerows([line if own else line[:3] for line in lines])
    (root / "source.json").write_text(json.dumps({"name": data.name}), encoding="utf-8")
    return root
