"""Pictures of graphs with what a model says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE, CAPTION, PAD = 200, 34, 12
INK, LINE, WRONG = (40, 44, 52), (150, 156, 166), (190, 60, 40)
COLOURS = ((108, 117, 125), (0, 120, 160), (200, 80, 40), (90, 150, 60), (150, 90, 170), (220, 170, 30), (0, 150, 140), (170, 60, 90))


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 8) -> Image.Image:
    """Up to eight graphs. Nodes are coloured by what is said of them (with a red rim where that is wrong), or else by type; below it what
    is said of the graph, and what is known."""
    nodes, edges = batch["nodes"].cpu().numpy()[:most], batch["edges"].cpu().numpy()[:most]
    kinds = batch["edge_types"].cpu().numpy()[:most]
    columns = min(4, len(nodes))
    lines = -(-len(nodes) // columns)
    sheet = Image.new("RGB", (columns * (TILE + PAD) + PAD, lines * (TILE + CAPTION + PAD) + PAD), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, types in enumerate(nodes):
        x, y = PAD + (i % columns) * (TILE + PAD), PAD + (i // columns) * (TILE + CAPTION + PAD)
        n = int((types >= 0).sum())
        pairs = edges[i][(edges[i] >= 0).all(1)]
        colour, wrong = _node_colours(prediction, batch, i, types, n)
        _graph(pen, (x, y), layout(n, pairs), pairs, kinds[i], colour, wrong)
        for line, (text, ink) in enumerate(_caption(prediction, batch, i, names, n, wrong)):
            pen.text((x, y + TILE + 2 + 15 * line), text, ink, font)
    return sheet


def layout(n: int, pairs: np.ndarray) -> np.ndarray:
    """Where nodes are drawn, float [n, 2] in [0, 1]; the same graph lies the same way each time."""
    import networkx as nx

    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(pairs.tolist())
    connected = n > 1 and nx.is_connected(graph)
    found = nx.kamada_kawai_layout(graph) if connected and n <= 80 else nx.spring_layout(graph, seed=0, iterations=30)
    place = np.array([found[i] for i in range(n)])
    low, high = place.min(0), place.max(0)
    return (place - low) / np.maximum(high - low, 1e-6) if n > 1 else np.full((1, 2), 0.5)


def _node_colours(prediction: Any, batch: Mapping[str, Any], i: int, types: np.ndarray, n: int) -> tuple[list[int], list[bool]]:
    label = getattr(prediction, "label", None)
    if label is None or label.ndim != 2:
        return types[:n].tolist(), [False] * n
    said = label[i].cpu().numpy()[:n]
    true = batch["label"][i].cpu().numpy()[:n] if "label" in batch else said
    return said.tolist(), ((true >= 0) & (said != true)).tolist()


def _graph(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    place: np.ndarray,
    pairs: np.ndarray,
    kinds: np.ndarray,
    colour: Sequence[int],
    wrong: Sequence[bool],
) -> None:
    radius = 5 if len(place) <= 40 else 3
    at = np.array(corner) + radius + 3 + place * (TILE - 2 * radius - 6)
    many = len(pairs) > 6 * len(place)
    for (a, b), kind in zip(pairs, kinds, strict=False):
        if a < b:
            pen.line([*at[a], *at[b]], LINE if not many else (226, 229, 233), 1 + 2 * min(int(kind), 2))
    for (x, y), c, bad in zip(at, colour, wrong, strict=True):
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(box, COLOURS[c % len(COLOURS)], WRONG if bad else "white", 2 if bad else 1)


def _caption(
    prediction: Any, batch: Mapping[str, Any], i: int, names: Sequence[str], n: int, wrong: Sequence[bool]
) -> list[tuple[str, Any]]:
    """Up to two lines, each with its ink."""
    if hasattr(prediction, "value"):
        value = prediction.value[i].float().cpu().flatten()
        lines = [(f"says {value[0]:.3g}" if len(value) == 1 else f"says {[round(v, 2) for v in value[:3].tolist()]}", INK)]
        if "target" in batch:
            target = batch["target"][i].float().cpu().flatten()
            lines.append((f"is {target[0]:.3g}" if len(target) == 1 else f"is {[round(v, 2) for v in target[:3].tolist()]}", INK))
        return lines
    if prediction.label.ndim == 2:
        text = f"{n} nodes" + (f", {sum(wrong)} wrong" if "label" in batch else "")
        return [(text, WRONG if any(wrong) else INK)]
    said = int(prediction.label[i])
    called = names or [str(c) for c in range(prediction.probabilities.shape[-1])]
    lines = [(f"{called[said]} {float(prediction.probabilities[i, said]):.0%}", INK)]
    if "label" in batch and int(batch["label"][i]) != said:
        lines.append((f"is {called[int(batch['label'][i])]}", WRONG))
    return lines


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Matplotlib figures by caption: said against true values, or the confusion matrix."""
    from matplotlib.figure import Figure

    from formarium.tasks.graph_prediction.metrics import _labels, _values

    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.subplots()
    if hasattr(predictions[0], "value"):
        pairs = [_values(p, b) for p, b in zip(predictions, batches, strict=True)]
        said, true = (np.concatenate([side.ravel() for side in s]) for s in zip(*pairs, strict=True))
        axes.scatter(true, said, s=8, alpha=0.6, color="#0078a0")
        ends = [np.nanmin(true), np.nanmax(true)]
        axes.plot(ends, ends, color="#969ca6", linewidth=1)
        axes.set_xlabel("true")
        axes.set_ylabel("said")
        return {"Said against true": figure}
    pairs = [pair for p, b in zip(predictions, batches, strict=True) for pair in _labels(p, b)]
    said, true = (np.concatenate(side) for side in zip(*pairs, strict=True))
    classes = predictions[0].probabilities.shape[-1]
    matrix = np.bincount(true * classes + said, minlength=classes * classes).reshape(classes, classes)
    axes.imshow(matrix / np.maximum(matrix.sum(1, keepdims=True), 1), cmap="BuGn", vmin=0, vmax=1)
    for (a, b), count in np.ndenumerate(matrix):
        axes.text(b, a, str(count), ha="center", va="center", fontsize=8)
    called = names if len(names) == classes else [str(c) for c in range(classes)]
    axes.set_xticks(range(classes), called, rotation=45, fontsize=8)
    axes.set_yticks(range(classes), called, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return {"Confusion (rows: true, columns: predicted)": figure}
