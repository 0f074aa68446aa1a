"""Pictures of predictions: each slide's tiles where they lie, with how much each counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL, PANEL, MARGIN = 40, 220, 22


def places(coords: np.ndarray) -> np.ndarray:
    """Tiles' places as whole cells, int [tiles, 2] (column, row) from 0; in rows of equal length where they are unknown."""
    n = len(coords)
    if np.unique(coords, axis=0).shape[0] < n:  # unknown, or not told apart
        columns = int(np.ceil(np.sqrt(n)))
        return np.stack([np.arange(n) % columns, np.arange(n) // columns], 1)
    out = np.zeros((n, 2), dtype=int)
    for axis in range(2):
        values = np.unique(coords[:, axis])
        step = max(np.diff(values).min(), 1e-6) if len(values) > 1 else 1.0
        out[:, axis] = np.round((coords[:, axis] - values[0]) / step)
        if out[:, axis].max() > 4 * n:  # scattered: only the order is kept
            out[:, axis] = np.searchsorted(values, coords[:, axis])
    return out


def heat(value: float) -> tuple[int, int, int]:
    """0 pale, 1 red."""
    low, high = np.array([238, 236, 230]), np.array([190, 32, 30])
    return tuple(int(v) for v in low + (high - low) * float(np.clip(value, 0, 1)) ** 0.6)  # type: ignore[return-value]


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 16) -> Image.Image:
    """Up to 16 slides, their tiles framed (or, of features, coloured) by attention."""
    count = min(most, len(prediction.label))
    columns = min(4, count)
    lines = -(-count // columns)
    page = Image.new("RGB", (columns * PANEL, lines * (PANEL + MARGIN)), "white")
    names = [*names] or [str(i) for i in range(prediction.probabilities.shape[1])]
    for i in range(count):
        panel = _panel(prediction, batch, i)
        panel.thumbnail((PANEL - 8, PANEL - 8))
        left, top = (i % columns) * PANEL, (i // columns) * (PANEL + MARGIN)
        page.paste(panel, (left + 4, top + MARGIN))
        said = int(prediction.label[i])
        text = f"{batch['id'][i]}: {names[said]} {float(prediction.probabilities[i, said]):.0%}"
        right = "label" not in batch or int(batch["label"][i]) == said
        ImageDraw.Draw(page).text((left + 4, top + 5), text[:36], fill="black" if right else (180, 30, 30))
    return page


def _panel(prediction: Any, batch: Mapping[str, Any], i: int) -> Image.Image:
    real = batch["mask"][i].cpu().numpy()
    cells = places(batch["coords"][i].cpu().numpy()[real])
    attention = prediction.attention[i].float().cpu().numpy()[: len(real)][real]
    share = attention / max(attention.max(), 1e-12)
    width, height = (cells.max(0) + 1) * CELL
    panel = Image.new("RGB", (int(width), int(height)), (250, 250, 250))
    pen = ImageDraw.Draw(panel)
    tiles = batch["tiles"][i].cpu().numpy()[real] if "tiles" in batch else None
    for j, (x, y) in enumerate(cells * CELL):
        box = (int(x), int(y), int(x) + CELL - 2, int(y) + CELL - 2)
        pen.rectangle(box, fill=heat(share[j]))
        if tiles is not None:
            pixels = (tiles[j].transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)
            panel.paste(Image.fromarray(pixels).resize((CELL - 9, CELL - 9)), (box[0] + 4, box[1] + 4))
    return panel


def examples(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[Any, Mapping[str, Any]]:
    """The first batch that still has its bags."""
    for prediction, batch in zip(predictions, batches, strict=True):
        if "mask" in batch:
            return prediction, batch
    return predictions[0], batches[0]


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Figure]:
    """The ROC curve of each class."""
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_curve

    from formarium.tasks.slide_classification.metrics import auc, joined

    if not batches or "label" not in batches[0]:
        return {}
    p, label = joined(predictions, batches)
    figure = Figure(figsize=(4, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    for c in range(1 if p.shape[1] == 2 else 0, p.shape[1]):
        if 0 < (label == c).sum() < len(label):
            wrong, right, _ = roc_curve(label == c, p[:, c])
            axis.plot(wrong, right, label=str(names[c]) if c < len(names) else str(c))
    axis.set_xlabel("false positives")
    axis.set_ylabel("true positives")
    axis.legend(fontsize=8)
    return {f"ROC curve (area {auc(p, label):.3f})": figure}
