"""Pictures of predictions: what was observed, the solution said and true, and the equations."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

COLOURS = ("#2a6f97", "#e76f51", "#2a9d8f", "#8a5a9e")


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 9) -> Image.Image:
    """Up to 9 samples: dots observed, lines true, dashes said, the equations above."""
    from matplotlib.figure import Figure

    count = min(most, len(prediction.solution))
    columns = min(3, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 2.7 * lines), layout="constrained", dpi=90)
    cells = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in cells[count:]:
        axes.axis("off")
    for i, axes in enumerate(cells[:count]):
        _one(axes, prediction, batch, i)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _one(axes: Any, prediction: Any, batch: Mapping[str, Any], i: int) -> None:
    seen = batch["data"][i][batch["observed"][i]].float().cpu().numpy()
    query, said = batch["query"][i].float().cpu().numpy(), prediction.solution[i].float().cpu().numpy()
    true = batch["target"][i].float().cpu().numpy() if "target" in batch else None
    dims = int(batch["dims"][i].sum())
    shown = range(dims) if said.shape[1] == batch["dims"].shape[1] else np.linspace(0, said.shape[1] - 1, 3).astype(int)
    for colour, k in zip(COLOURS, shown, strict=False):
        axes.plot(seen[:, 0], seen[:, 1 + k], ".", color=colour, markersize=3)
        if true is not None:
            axes.plot(query, true[:, k], color=colour, alpha=0.45)
        axes.plot(query, said[:, k], "--", color=colour)
    title = prediction.equation[i].replace(", du", "\ndu") or "(no equations)"
    axes.set_title(
        "\n".join(line[:58] for line in title.splitlines()[:3]), fontsize=7, color="#1b1f24" if prediction.valid[i] else "#be3c28"
    )
    axes.tick_params(labelsize=7)
    axes.set_xlabel("t", fontsize=7)


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The error by how far ahead it is asked, as a figure by caption."""
    from matplotlib.figure import Figure

    said = np.concatenate([p.solution.float().cpu().numpy() for p in predictions])
    true = np.concatenate([b["target"].float().cpu().numpy() for b in batches])
    query = batches[0]["query"][0].cpu().numpy()
    error = np.linalg.norm(said - true, axis=2) / np.maximum(np.sqrt((true**2).sum(2).mean(1, keepdims=True)), 1e-12)
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(query, np.median(error, 0), color=COLOURS[0], label="median")
    axes.fill_between(query, *np.quantile(error, [0.1, 0.9], 0), color=COLOURS[0], alpha=0.2, label="80 % of samples")
    axes.set_xlabel("t")
    axes.set_ylabel("error over the trajectory's size")
    axes.legend()
    return {"Error by time": figure}
