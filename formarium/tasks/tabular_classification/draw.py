"""Pictures of predictions: each table by its two most telling columns, the labelled rows filled, the others ringed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from formarium.tasks.tabular_classification.metrics import asked
from formarium.tasks.tabular_classification.model import UNKNOWN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0b6e8f", "#d1603d", "#6a994e", "#8e5ea2", "#c9a227", "#444b59", "#b33a64", "#3aa6a0", "#7a5230", "#9aa5b1")


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 9) -> Image.Image:
    """Up to nine tables: labelled rows as dots, the others as rings of the predicted class's colour, crossed where they are wrong."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = asked(prediction, batch)[:most]
    columns = min(3, len(tables))
    lines = -(-len(tables) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for spare in axes[len(tables) :]:
        spare.set_axis_off()
    for i, (probabilities, true) in enumerate(tables):
        context, rows, features = (int(batch[k][i]) for k in ("context", "rows", "features"))
        x, label = batch["x"][i, :rows, :features].cpu().numpy(), batch["label"][i, :context].cpu().numpy()
        _panel(axes[i], x, label, probabilities.argmax(1), true, batch["id"][i] if "id" in batch else "")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    return Image.open(buffer).convert("RGB")


def _panel(axis: Any, x: np.ndarray, label: np.ndarray, said: np.ndarray, true: np.ndarray, title: str) -> None:
    a, b = telling(x[: len(label)], label)
    seen, query = x[: len(label)], x[len(label) :]
    colour = [COLOURS[c % len(COLOURS)] for c in range(int(max(label.max(initial=0), said.max(initial=0))) + 1)]
    axis.scatter(seen[:, a], seen[:, b], s=10, c=[colour[c] if c >= 0 else "#cccccc" for c in label], alpha=0.7, linewidths=0)
    axis.scatter(query[:, a], query[:, b], s=26, facecolors="none", edgecolors=[colour[c] for c in said], linewidths=1.1)
    wrong = (true != UNKNOWN) & (true != said)
    axis.scatter(query[wrong, a], query[wrong, b], s=16, c="black", marker="x", linewidths=0.8)
    known = int((true != UNKNOWN).sum())
    axis.set_title(f"{title}: {known - wrong.sum()} of {known} right" if known else title, fontsize=8)
    axis.set_xlabel(f"column {a}", fontsize=7)
    axis.set_ylabel(f"column {b}", fontsize=7)
    axis.tick_params(labelsize=6)


def telling(x: np.ndarray, label: np.ndarray) -> tuple[int, int]:
    """The two columns whose class means lie farthest apart, in deviations; the same one twice where there is no other."""
    x = np.nan_to_num(x)
    spread = x.std(0) + 1e-9
    means = np.stack([x[label == c].mean(0) for c in np.unique(label)])
    order = np.argsort(-(means.std(0) / spread))
    return int(order[0]), int(order[min(1, len(order) - 1)])


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Figure]:
    """How far the probabilities can be trusted: of the rows said with 60%, 60% should be right."""
    from matplotlib.figure import Figure

    best, right = [], []
    for prediction, batch in zip(predictions, batches, strict=True):
        for p, label in asked(prediction, batch):
            known = label != UNKNOWN
            best.append(p[known].max(1))
            right.append(p[known].argmax(1) == label[known])
    p, ok = np.concatenate(best), np.concatenate(right)
    if not len(p):
        return {}
    edges = np.quantile(p, np.linspace(0, 1, 11))
    place = np.clip(np.searchsorted(edges, p, side="right") - 1, 0, 9)
    present = [i for i in range(10) if (place == i).any()]
    figure = Figure(figsize=(4, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    axis.plot([p[place == i].mean() for i in present], [ok[place == i].mean() for i in present], "o-", color=COLOURS[0])
    axis.set_xlabel("said")
    axis.set_ylabel("right")
    return {"Reliability (ten groups of equal size)": figure}
