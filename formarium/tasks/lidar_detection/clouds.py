"""Files that hold a cloud of points: .bin (float32), .npy, .npz, .pcd, .ply, .xyz and .txt, as one float32 array with named columns."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from formarium.errors import BadInput

FORMATS = (".bin", ".npy", ".npz", ".pcd", ".ply", ".xyz", ".txt")
_FIRST = ("x", "y", "z", "intensity", "ring", "time")  # what the columns of nameless files are taken for


@dataclass
class Cloud:
    """values: float32 [points, columns], x, y, z first. columns: their names."""

    values: np.ndarray
    columns: tuple[str, ...]

    def take(self, names: Sequence[str]) -> np.ndarray | None:
        """float32 [points, len(names)], or None where a column is missing."""
        if not all(n in self.columns for n in names):
            return None
        return self.values[:, [self.columns.index(n) for n in names]]


def read_cloud(path: str | Path, features: int | None = None) -> Cloud:
    """The points in a file. features: columns of a .bin, which doesn't say (by default 5 for nuScenes' .pcd.bin, else 4 as KITTI has them).

    Raises BadInput: no such file, another format, not the number of columns that were said, no points, values that aren't finite.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(str(path), expected="a file of points", got="no such file")
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise BadInput(str(path), expected=f"a file of points ({', '.join(FORMATS)})", got=suffix or "a name without an ending")
    try:
        cloud = {".bin": _bin, ".npy": _npy, ".npz": _npy, ".pcd": _pcd, ".ply": _ply, ".xyz": _text, ".txt": _text}[suffix](path, features)
    except BadInput:
        raise
    except (ValueError, KeyError, IndexError, OSError, EOFError, StopIteration) as e:
        raise BadInput(str(path), expected=f"points as a {suffix} file holds them", got=f"{type(e).__name__}: {e}") from None
    return checked(cloud, str(path))


def checked(cloud: Cloud, what: str) -> Cloud:
    """The cloud itself. BadInput where it is empty, has no x, y, z, or values that aren't finite."""
    values = cloud.values
    if values.ndim != 2 or values.shape[1] < 3:
        raise BadInput(what, expected="points [n, 3 or more], x, y, z first", got=f"an array {[*values.shape]}")
    if not len(values):
        raise BadInput(what, expected="at least one point", got="none")
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        fix = "leave out the points that the sensor didn't get back"
        raise BadInput(what, expected="finite values", got=f"NaN or infinity in {int(bad.sum())} of {len(values)} points", fix=fix)
    return cloud


def from_array(values: np.ndarray, what: str) -> Cloud:
    """A cloud of an array [n, 3 or more], columns named as far as the usual order goes."""
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise BadInput(what, expected="numbers [points, 3 or more]", got=f"{values.dtype} {[*values.shape]}")
    columns = tuple(_FIRST[i] if i < len(_FIRST) else f"value{i}" for i in range(values.shape[1]))
    return checked(Cloud(np.ascontiguousarray(values, dtype=np.float32), columns), what)


def _bin(path: Path, features: int | None) -> Cloud:
    count = features or (5 if path.name.endswith(".pcd.bin") else 4)
    data = path.read_bytes()
    if len(data) % (4 * count):
        fix = f"give features={5 if count == 4 else 4}, if that is what the file has"
        raise BadInput(str(path), expected=f"float32 points of {count} values ({4 * count} bytes each)", got=f"{len(data)} bytes", fix=fix)
    return from_array(np.frombuffer(data, dtype="<f4").reshape(-1, count), str(path))


def _npy(path: Path, features: int | None) -> Cloud:
    values = np.load(path, allow_pickle=False)
    if not isinstance(values, np.ndarray):
        values = values["points"] if "points" in values.files else values[values.files[0]]
    return from_array(values, str(path))


def _text(path: Path, features: int | None) -> Cloud:
    lines = [
        line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip() and line.strip()[0] not in "#/"
    ]
    if not lines:
        raise BadInput(str(path), expected="at least one point", got="none")
    values = np.loadtxt(io.StringIO("\n".join(line.replace(",", " ") for line in lines)), ndmin=2)
    cloud = from_array(values, str(path))
    return Cloud(cloud.values, (*"xyz", "nx", "ny", "nz")) if values.shape[1] == 6 else cloud


# PCD and PLY say what their columns are -------------------------------------------------------------------------------

_ALIASES = {
    "i": "intensity",
    "reflectance": "intensity",
    "scalar_intensity": "intensity",
    "normal_x": "nx",
    "normal_y": "ny",
    "normal_z": "nz",
}


def _named(columns: dict[str, np.ndarray]) -> Cloud:
    """x, y, z in front, the rest in the file's order; empty padding columns dropped."""
    columns = {_ALIASES.get(k.lower(), k.lower()): v for k, v in columns.items() if k != "_"}
    if not all(a in columns for a in "xyz"):
        raise ValueError(f"no x, y, z among {', '.join(columns) or 'no columns'}")
    names = (*"xyz", *(k for k in columns if k not in (*"xyz",) and columns[k].ndim == 1))
    return Cloud(np.stack([columns[k].astype(np.float32) for k in names], 1), names)


def _pcd(path: Path, features: int | None) -> Cloud:
    data, head, at = path.read_bytes(), {}, 0
    while "DATA" not in head:
        end = data.index(b"\n", at)
        words = data[at:end].decode("ascii", "replace").split()
        at = end + 1
        if words and not words[0].startswith("#"):
            head[words[0].upper()] = words[1:]
    names, sizes, kinds = head["FIELDS"], [int(s) for s in head["SIZE"]], head["TYPE"]
    counts = [int(c) for c in head.get("COUNT", ["1"] * len(names))]
    points = int(head["POINTS"][0]) if "POINTS" in head else int(head["WIDTH"][0]) * int(head["HEIGHT"][0])
    how = head["DATA"][0].lower()
    if how == "ascii":
        table = np.loadtxt(io.BytesIO(data[at:]), ndmin=2, max_rows=points)
        starts = np.cumsum([0, *counts])
        return _named({n: table[:, s] for n, s, c in zip(names, starts, counts, strict=False) if c == 1})
    letter = {"F": "f", "I": "i", "U": "u"}
    unique = [n if n != "_" else f"_{i}" for i, n in enumerate(names)]
    dtype = np.dtype([(n, f"<{letter[k]}{s}", (c,) if c > 1 else ()) for n, k, s, c in zip(unique, kinds, sizes, counts, strict=True)])
    if how == "binary":
        table = np.frombuffer(data, dtype, count=points, offset=at)
        return _named({n: table[n] for n in unique if not n.startswith("_")})
    raise BadInput(str(path), expected="DATA ascii or binary", got=f"DATA {how}", fix="convert it, with pcl_convert_pcd_ascii_binary say")


_PLY = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4", "double": "f8"}
_PLY |= {"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"}


def _ply(path: Path, features: int | None) -> Cloud:
    data = path.read_bytes()
    if not data.startswith(b"ply"):
        raise ValueError("the file doesn't begin with ply")
    end = data.index(b"end_header")
    at = data.index(b"\n", end) + 1
    how, points, properties, element, before = "", 0, [], "", False
    for line in data[:end].decode("ascii", "replace").splitlines():
        words = line.split()
        if words[:1] == ["format"]:
            how = words[1]
        elif words[:1] == ["element"]:
            element = words[1]
            before = before or (element != "vertex" and not properties)
            points = int(words[2]) if element == "vertex" else points
        elif words[:1] == ["property"] and element == "vertex":
            if words[1] == "list":
                raise ValueError("a list among the properties of vertices")
            properties.append((words[2], _PLY[words[1]]))
    if before:
        raise ValueError("the vertices don't come first")
    names = [n for n, _ in properties]
    if how == "ascii":
        table = np.loadtxt(io.BytesIO(data[at:]), ndmin=2, max_rows=points, usecols=range(len(names)))
        return _named({n: table[:, i] for i, n in enumerate(names)})
    order = {"binary_little_endian": "<", "binary_big_endian": ">"}[how]
    table = np.frombuffer(data, np.dtype([(n, order + t) for n, t in properties]), count=points, offset=at)
    return _named({n: table[n] for n in names})
