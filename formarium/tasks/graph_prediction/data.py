"""Reading graphs that people have: PyTorch Geometric data (.pt), JSON, CSV edge lists.

graphs.json         a list of {"nodes": [types], "edges": [[source, target], ...], "edge_types": [...], "label" or "target": ...}
graphs.pt           PyG: a list of Data, or what InMemoryDataset.save wrote; or a list of dicts of tensors (x, edge_index, edge_attr, y).
                    Read with weights_only=True: a pickle that would run code is refused.
edges.csv           graph, source, target[, type]; beside it nodes.csv (graph, node, type[, label or target]) and graphs.csv (graph, label
                    or target[, split]). Nodes are numbered from 0 in each graph.
train.json, val.json [, test.json] (or .pt), or one file, which is split by the seed.

A label or target that is one a graph is the graph's; one that is a list as long as its nodes is the nodes'. Whole numbers are classes,
others are values.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formarium.errors import BadInput, MissingExtra
from formarium.task import Data, Sample

FORMATS = (".json", ".pt", ".pth", ".csv")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Graphs:
    """Graphs in memory: nodes int64 [n], edges int64 [e, 2], edge_types int64 [e], label (int or int64 [n]) or target (float32 [t] or
    [n, t]), id."""

    samples: list[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def read(
    path: str | Path, *, level: str | None = None, regression: bool | None = None, holdout: float = 0.2, seed: int = 0, strict: bool = True
) -> Data:
    """The graphs and splits in a file or folder of the formats above.

    level: "graph" or "node", and regression: whether values are predicted; both found in the data where not given. holdout: the share
    that becomes "val" where the files have no splits. Raises BadInput: nothing there, an edge that ends nowhere, labels that don't fit.
    """
    root = Path(path)
    if not root.exists():
        raise BadInput(str(path), expected="a file or folder of graphs", got="no such path")
    if root.is_dir():
        given = {SPLITS[f.stem.lower()]: f for f in sorted(root.iterdir()) if f.stem.lower() in SPLITS and f.suffix in FORMATS}
        if "train" in given and len(given) > 1:
            splits = {name: read_file(f) for name, f in given.items()}
        elif (root / "edges.csv").is_file():
            splits = _by_split(read_csv(root))
        else:
            files = [f for f in sorted(root.iterdir()) if f.suffix in FORMATS]
            if not files:
                raise BadInput(str(path), expected="graphs (.json, .pt, or edges.csv)", got="none in it")
            splits = {"all": [s for f in files for s in read_file(f)]}
    else:
        splits = _by_split(read_file(root))
    return as_data(root.stem, splits, {"path": str(root)}, level=level, regression=regression, holdout=holdout, seed=seed)


def as_data(
    name: str, splits: Mapping[str, list[Sample]], source: dict[str, Any], *, level: str | None = None, regression: bool | None = None,
    holdout: float = 0.2, seed: int = 0, names: Sequence[str] = (),
) -> Data:  # fmt: skip
    """Data from graphs by split ("all": to be split). See `read`."""
    every = [s for samples in splits.values() for s in samples]
    if not every:
        raise BadInput(name, expected="at least one graph", got="none")
    answers = [s.get("y") for s in every]
    if any(a is None for a in answers):
        which = next(s["id"] for s, a in zip(every, answers, strict=True) if a is None)
        raise BadInput(f"{name}: {which}", expected="a label or target in every graph", got="none")
    level = level or _level(every)
    if regression is None:
        regression = any(np.issubdtype(a.dtype, np.floating) for a in answers)
    for s in every:
        _answer(s, level, regression)
    if "all" in splits:
        rng = np.random.default_rng(seed)
        order, held = rng.permutation(len(every)), max(1, round(holdout * len(every)))
        if len(every) < 2:
            raise BadInput(name, expected="at least two graphs, one to train on and one to test on", got="one")
        splits = {"train": [every[i] for i in sorted(order[held:])], "val": [every[i] for i in sorted(order[:held])]}
    if "val" not in splits:
        splits = {**splits, "val": splits["test"]}
    key = "target" if regression else "label"
    if regression:
        outputs = len(np.atleast_1d(every[0]["target"])) if level == "graph" else every[0]["target"].shape[1]
        names = names or (["value"] if outputs == 1 else [f"value {i}" for i in range(outputs)])
    else:
        outputs = 1 + max(int(np.max(s[key])) for s in every)
        names = names or [str(i) for i in range(outputs)]
        if outputs < 2:
            raise BadInput(name, expected="at least two classes", got="one")
    args = {
        "level": level,
        "regression": regression,
        "num_outputs": outputs,
        "num_node_types": 1 + max(int(s["nodes"].max()) for s in every),
        "num_edge_types": 1 + max((int(s["edge_types"].max()) for s in every if len(s["edge_types"])), default=0),
    }
    return Data(name, "graph-prediction", {k: Graphs(v) for k, v in splits.items()}, args, names, [], source)


def inputs(paths: Sequence[str | Path]) -> Graphs:
    """Unlabelled graphs of files, folders and globs."""
    found: list[Sample] = []
    for entry in paths:
        p = Path(entry)
        files = [p] if p.is_file() else sorted(f for f in p.iterdir() if f.suffix in FORMATS) if p.is_dir() else []
        if p.is_dir() and (p / "edges.csv").is_file():
            found += read_csv(p)
            continue
        files = files or [Path(f) for f in sorted(glob.glob(str(entry), recursive=True)) if Path(f).is_file()]
        if not files:
            raise BadInput(str(entry), expected="a file of graphs, a folder or a glob", got="no such path")
        for f in files:
            found += read_file(f)
    for s in found:
        s.pop("y", None)
    return Graphs(found)


def from_memory(value: Any, index: int) -> Sample:
    """A raw sample of a graph in memory: a PyG Data, a dict as in JSON or of tensors, or a NetworkX graph."""
    name = f"input {index}"
    if hasattr(value, "edge_index") and not isinstance(value, Mapping):
        sample = graph(_pyg_fields(value), name)
    elif isinstance(value, Mapping):
        sample = graph({"id": name, **value}, name)
    elif hasattr(value, "nodes") and hasattr(value, "is_directed"):
        places = {node: i for i, node in enumerate(value.nodes)}
        edges = [(places[a], places[b]) for a, b in value.edges]
        kinds = [d.get("type", 0) for *_, d in value.edges(data=True)]
        types = [value.nodes[n].get("type", 0) for n in value.nodes]
        sample = graph({"nodes": types, "edges": edges, "edge_types": kinds, "directed": value.is_directed()}, name)
    else:
        raise BadInput(name, expected="a graph: PyG Data, NetworkX, or a dict with nodes and edges", got=type(value).__name__)
    sample.pop("y", None)
    return sample


# files --------------------------------------------------------------------------------------------------------------


def read_file(path: Path) -> list[Sample]:
    """Graphs of one file, each with its answer (label or target, where it has one) under "y" and its split, where it says one."""
    if path.suffix == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise BadInput(str(path), expected="JSON", got=str(e).split("\n")[0]) from None
        found = found.get("graphs", [found]) if isinstance(found, Mapping) else found
        if not isinstance(found, list) or not all(isinstance(g, Mapping) for g in found):
            raise BadInput(str(path), expected='a list of graphs, {"nodes": [...], "edges": [...]} each', got="something else")
        return [graph(g, f"{path.stem} {i}") for i, g in enumerate(found)]
    if path.suffix in (".pt", ".pth"):
        return [graph(_pyg_fields(g), f"{path.stem} {i}") for i, g in enumerate(_load_pt(path))]
    if path.suffix == ".csv":
        return read_csv(path.parent, path.name)
    raise BadInput(str(path), expected=f"a file of type {', '.join(FORMATS)}", got=path.suffix or "no suffix")


def read_csv(folder: Path, edges: str = "edges.csv") -> list[Sample]:
    """Graphs of an edge list with, where they are there, nodes.csv and graphs.csv beside it. An edge's reverse is added where it lacks."""
    rows = {name: _table(folder / name) for name in ("nodes.csv", "graphs.csv") if (folder / name).is_file()}
    found: dict[str, dict[str, Any]] = {}

    def entry(row: Mapping[str, str]) -> dict[str, Any]:
        name = row.get("graph", "0")
        return found.setdefault(name, {"id": f"graph {name}", "edges": [], "edge_types": [], "types": {}, "answers": {}})

    for row in _table(folder / edges):
        g = entry(row)
        for need in ("source", "target"):
            if need not in row:
                raise BadInput(str(folder / edges), expected="columns source and target", got=", ".join(row))
        g["edges"].append((_whole(row["source"], edges), _whole(row["target"], edges)))
        g["edge_types"].append(_whole(row.get("type") or "0", edges))
    for row in rows.get("nodes.csv", []):
        node = _whole(row.get("node", ""), "nodes.csv")
        entry(row)["types"][node] = _whole(row.get("type") or "0", "nodes.csv")
        for key in ("label", "target"):
            if row.get(key) not in (None, ""):
                entry(row)["answers"][node] = _number(row[key])
    for row in rows.get("graphs.csv", []):
        g = entry(row)
        g |= {"split": SPLITS[row["split"].lower()]} if row.get("split", "").lower() in SPLITS else {}
        if answer := row.get("label") or row.get("target"):
            g["y"] = _number(answer)
    for g in found.values():
        size = 1 + max([*g["types"], *(end for edge in g["edges"] for end in edge)], default=-1)
        g["nodes"] = [g["types"].get(i, 0) for i in range(size)]
        if g["answers"]:
            g["y"] = [g["answers"].get(i, -1) for i in range(size)]
    return [graph(g, g["id"]) for g in found.values()]


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as f:
        return [{k.strip().lower(): (v or "").strip() for k, v in row.items() if k} for row in csv.DictReader(f)]


def _whole(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadInput(where, expected="whole numbers for nodes and types", got=repr(text)) from None


def _number(text: str) -> float | int:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise BadInput("label or target", expected="a number", got=repr(text)) from None


def _load_pt(path: Path) -> list[Any]:
    import torch

    try:
        from torch_geometric.data.data import Data as PyG
        from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
        from torch_geometric.data.storage import GlobalStorage

        safe: list[Any] = [PyG, DataEdgeAttr, DataTensorAttr, GlobalStorage]
    except ImportError:
        safe = []
    try:
        with torch.serialization.safe_globals(safe):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        if not safe and "torch_geometric" in str(e):
            raise MissingExtra("torch_geometric", "graph") from None
        reason = str(e).split("\n")[0][:160]
        raise BadInput(str(path), expected="PyG Data or dicts of tensors, safely saved", got=f"{type(e).__name__}: {reason}") from None
    if isinstance(found, tuple) and len(found) >= 2 and isinstance(found[1], Mapping):  # InMemoryDataset.save: one Data and its slices
        return _uncollated(found[0], found[1])
    if not isinstance(found, (list, tuple)):
        found = [found]
    if not all(isinstance(g, Mapping) or hasattr(g, "edge_index") for g in found):
        raise BadInput(str(path), expected="a list of graphs", got=f"a list of {type(found[0]).__name__}")
    return [*found]


def _uncollated(whole: Any, slices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The graphs of PyG's one big Data. Edges in it count nodes from 0 in each graph."""
    fields = whole if isinstance(whole, Mapping) else whole.to_dict()
    fields = fields.get("_global_store", fields)
    count = len(next(iter(slices.values()))) - 1
    out: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, cuts in slices.items():
        for i, (a, b) in enumerate(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)):
            value = fields[key]
            out[i][key] = value[:, a:b] if key == "edge_index" else value[a:b]
    return out


def _pyg_fields(value: Any) -> dict[str, Any]:
    """The names of `graph` for what PyG calls x, edge_index, edge_attr, y. Its edges stand as they are."""
    fields = dict(value) if isinstance(value, Mapping) else {k: value[k] for k in value.keys()}  # noqa: SIM118 (not a dict)
    if "edge_index" not in fields:
        return fields
    x, ends = fields.get("x"), np.asarray(fields["edge_index"])
    size = len(x) if x is not None else int(fields.get("num_nodes") or getattr(value, "num_nodes", 0) or ends.max(initial=-1) + 1)
    out = {"nodes": np.zeros(size, np.int64) if x is None else x, "edges": ends.T, "directed": True}
    out |= {"edge_types": fields["edge_attr"]} if fields.get("edge_attr") is not None else {}
    out |= {"y": fields["y"]} if fields.get("y") is not None else {}
    return {**{k: fields[k] for k in ("id", "split") if k in fields}, **out}


# one graph ----------------------------------------------------------------------------------------------------------


def graph(fields: Mapping[str, Any], name: str) -> Sample:
    """A raw sample from the fields of a file, checked. An undirected graph (no "directed") gets the reverses that its edges lack."""
    name = str(fields.get("id", name))
    if "edge_index" in fields:
        return graph(_pyg_fields(fields), name)
    for need in ("nodes", "edges"):
        if fields.get(need) is None:
            raise BadInput(name, expected="nodes and edges", got=f"no {need}")
    nodes = _types(fields["nodes"], f"{name}: nodes")
    edges = _integers(fields["edges"], f"{name}: edges").reshape(-1, 2) if len(fields["edges"]) else np.zeros((0, 2), np.int64)
    kinds = fields.get("edge_types")
    kinds = np.zeros(len(edges), np.int64) if kinds is None else _types(kinds, f"{name}: edge types")
    if not len(nodes):
        raise BadInput(name, expected="at least one node", got="none")
    if len(kinds) != len(edges):
        raise BadInput(f"{name}: edge types", expected=f"one for each of {len(edges)} edges", got=str(len(kinds)))
    if len(edges) and (edges.min() < 0 or edges.max() >= len(nodes)):
        raise BadInput(
            f"{name}: edges",
            expected=f"between nodes 0 to {len(nodes) - 1}",
            got=f"an end at {edges.min() if edges.min() < 0 else edges.max()}",
        )
    if not fields.get("directed", False) and len(edges):
        there = {(a, b) for a, b in edges.tolist()}
        lacking = [i for i, (a, b) in enumerate(edges.tolist()) if (b, a) not in there]
        edges, kinds = np.concatenate([edges, edges[lacking][:, ::-1]]), np.concatenate([kinds, kinds[lacking]])
    sample: Sample = {"id": name, "nodes": nodes, "edges": np.ascontiguousarray(edges), "edge_types": kinds}
    answer = next((fields[k] for k in ("y", "label", "target") if fields.get(k) is not None), None)
    if answer is not None:
        sample["y"] = np.asarray(answer)
        if sample["y"].dtype.kind not in "iufb" or (sample["y"].dtype.kind == "f" and not np.isfinite(sample["y"]).all()):
            raise BadInput(f"{name}: label or target", expected="finite numbers", got=str(answer)[:40])
    if "split" in fields:
        sample["split"] = str(fields["split"])
    return sample


def _types(values: Any, what: str) -> np.ndarray:
    """Types as int64 [n], from whole numbers [n] or [n, 1], or one-hot rows [n, types]."""
    found = np.asarray(values)
    if found.ndim == 2 and found.shape[1] > 1:
        if not (np.isin(found, (0, 1)).all() and (found.sum(1) == 1).all()):
            raise BadInput(what, expected="one type each: whole numbers, or one-hot rows", got=f"{found.dtype} {[*found.shape]}")
        return found.argmax(1).astype(np.int64)
    found = _integers(found.reshape(len(found)), what) if found.size else np.zeros(0, np.int64)
    if found.size and found.min() < 0:
        raise BadInput(what, expected="types from 0", got=str(found.min()))
    return found


def _integers(values: Any, what: str) -> np.ndarray:
    try:
        found = np.asarray(values)
        whole = found.dtype.kind in "iub" or (found.dtype.kind == "f" and bool((found == np.floor(found)).all()))
    except ValueError:  # rows of different lengths
        whole = False
    if not whole:
        raise BadInput(what, expected="whole numbers", got=str(values)[:40])
    return found.astype(np.int64)


# answers ------------------------------------------------------------------------------------------------------------


def _level(samples: Iterable[Sample]) -> str:
    """ "node" where every answer is as long as its graph, and some graph has more than one node."""
    samples = [*samples]
    per_node = all(s["y"].ndim and len(s["y"]) == len(s["nodes"]) for s in samples)
    return "node" if per_node and any(len(s["nodes"]) > 1 for s in samples) else "graph"


def _answer(sample: Sample, level: str, regression: bool) -> None:
    """y under its proper name, type and shape."""
    y, n = sample.pop("y"), len(sample["nodes"])
    if level == "node":
        if not y.ndim or len(y) != n:
            raise BadInput(f"{sample['id']}: label or target", expected=f"one for each of {n} nodes", got=str([*y.shape]))
        y = y.reshape(n, -1)
    else:
        y = y.reshape(-1)
    if regression:
        sample["target"] = y.astype(np.float32)
    elif y.shape[-1] != 1:
        raise BadInput(f"{sample['id']}: label", expected="one class", got=f"{y.shape[-1]} numbers")
    else:
        sample["label"] = y[:, 0].astype(np.int64) if level == "node" else np.int64(y[0])


def _by_split(samples: list[Sample]) -> dict[str, list[Sample]]:
    """By the split that each sample names, or all together."""
    names = {s.get("split", "") for s in samples}
    found: dict[str, list[Sample]] = {}
    for s in samples:
        found.setdefault(SPLITS.get(s.pop("split", "").lower(), "all"), []).append(s)
    return found if "train" in found and "all" not in found and len(names) > 1 else {"all": samples}
