"""Pictures of predictions: each series with the stretches that the model points at; the confusion matrix."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0b6e8f", "#d1603d", "#6a994e", "#8e5ea2", "#c9a227", "#444b59", "#b33a64", "#3aa6a0", "#7a5230", "#9aa5b1")
WRONG = "#be3c28"


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 8) -> Image.Image:
    """Up to eight series, their channels one above the other; the nearest stretches in the colour of their class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = batch["series"][:most].float().cpu().numpy()
    probabilities = prediction.probabilities.float().cpu().numpy()
    names = names or [str(i) for i in range(probabilities.shape[1])]
    columns = min(2, len(series))
    lines = -(-len(series) // columns)
    height = 0.9 + 0.32 * min(series.shape[1], 8)
    figure = Figure(figsize=(5.2 * columns, height * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for spare in axes[len(series) :]:
        spare.set_axis_off()
    for i, x in enumerate(series):
        said = int(probabilities[i].argmax())
        true = int(batch["label"][i]) if "label" in batch else said
        _panel(axes[i], x[:8], prediction.matches[i])
        text = f"{names[said]} {probabilities[i, said]:.0%}" + ("" if true == said else f", is {names[true]}")
        axes[i].set_title(text, fontsize=8, color="black" if true == said else WRONG)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    return Image.open(buffer).convert("RGB")


def _panel(axis: Any, x: np.ndarray, matches: Sequence[Any], most: int = 4) -> None:
    step = 3.5
    scaled = (x - x.mean(1, keepdims=True)) / (x.std() + 1e-9)
    for channel, values in enumerate(scaled):
        axis.plot(values - step * channel, color="#8a929c", linewidth=0.7)
    for match in [m for m in matches if m.channel < len(x)][:most]:
        at = np.arange(match.start, match.end)
        axis.plot(at, scaled[match.channel, at] - step * match.channel, color=COLOURS[match.label % len(COLOURS)], linewidth=1.8)
    axis.set_yticks([-step * c for c in range(len(x))], [str(c) for c in range(len(x))], fontsize=6)
    axis.tick_params(axis="x", labelsize=6)


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Figure]:
    """The confusion matrix, rows true, columns predicted; colour is the share of a row."""
    from matplotlib.figure import Figure

    from formarium.tasks.time_series_classification.metrics import joined

    probabilities, label = joined(predictions, batches)
    classes = probabilities.shape[1]
    matrix = torch.bincount(label * classes + probabilities.argmax(1), minlength=classes * classes).view(classes, classes).numpy()
    size = min(9, 2.2 + 0.42 * classes)
    figure = Figure(figsize=(size, size), layout="constrained")
    axis = figure.subplots()
    axis.imshow(matrix / np.maximum(matrix.sum(1, keepdims=True), 1), cmap="BuGn", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(matrix):
        if count and classes <= 20:
            axis.text(j, i, str(count), ha="center", va="center", fontsize=8)
    if classes <= 40:
        axis.set_xticks(range(classes), [str(n)[:12] for n in names], rotation=90, fontsize=8)
        axis.set_yticks(range(classes), [str(n)[:12] for n in names], fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    return {"Confusion (rows: true, columns: predicted)": figure}


def examples(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], most: int = 8) -> tuple[Any, dict[str, Any]]:
    """Series to show: spread over the split, with up to three mistakes among them."""
    from formarium.tasks.time_series_classification.metrics import joined

    probabilities, label = joined(predictions, batches)
    wrong = (probabilities.argmax(1) != label).nonzero().flatten()[:3].tolist()
    spread = np.unique(np.linspace(0, len(label) - 1, 2 * most).astype(int)).tolist()
    others = [i for i in spread if i not in wrong]
    chosen = others[:: max(1, len(others) // (most - len(wrong)))][: most - len(wrong)] + wrong
    first = predictions[0]
    matches = [m for p in predictions for m in p.matches]
    picked = type(first)(probabilities[chosen], probabilities[chosen].argmax(1), [matches[i] for i in chosen])
    series = torch.cat([b["series"] for b in batches])[chosen]
    ids = [i for b in batches for i in b["id"]]
    return picked, {"series": series, "label": label[chosen], "id": [ids[i] for i in chosen]}
