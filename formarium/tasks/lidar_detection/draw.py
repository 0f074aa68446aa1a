"""Sweeps seen from above with boxes over them, and precision-recall curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from formarium.nn.ops.boxes import corners_bev

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE, PAD = 320, 8
TRUE, FOUND = (40, 160, 90), (214, 96, 30)
LEAST = 0.4  # score from which on a box is drawn


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 16) -> Image.Image:
    """Up to 16 sweeps from above, x up and y left: points by height, true boxes green, predicted ones orange with their front marked."""
    count = min(most, len(batch["count"]))
    columns = min(4, count)
    lines = -(-count // columns)
    sheet = Image.new("RGB", (columns * (TILE + PAD) + PAD, lines * (TILE + PAD) + PAD), "white")
    for i in range(count):
        tile = _tile(prediction, batch, i, names)
        sheet.paste(tile, (PAD + i % columns * (TILE + PAD), PAD + i // columns * (TILE + PAD)))
    return sheet


def _tile(prediction: Any, batch: Mapping[str, Any], i: int, names: Sequence[str]) -> Image.Image:
    points = batch["points"][i, : int(batch["count"][i])].float().cpu().numpy()
    low, high = np.percentile(points[:, :2], 0.5, axis=0), np.percentile(points[:, :2], 99.5, axis=0)
    middle, half = (low + high) / 2, max(float((high - low).max()) / 2, 1.0) * 1.04

    def place(xy: np.ndarray) -> np.ndarray:
        return np.stack([TILE / 2 - (xy[..., 1] - middle[1]) / half * TILE / 2, TILE / 2 - (xy[..., 0] - middle[0]) / half * TILE / 2], -1)

    canvas = np.full((TILE, TILE, 3), 250, dtype=np.uint8)
    at = place(points[:, :2]).astype(int)
    ok = ((at >= 0) & (at < TILE)).all(1)
    height = (points[:, 2] - np.percentile(points[:, 2], 5)) / 2.5
    shade = (190 - 150 * height.clip(0, 1)).astype(np.uint8)
    order = np.argsort(points[ok, 2])
    canvas[at[ok][order, 1], at[ok][order, 0]] = np.stack([shade[ok][order]] * 2 + [np.minimum(255, shade[ok][order] + 25)], 1)
    tile = Image.fromarray(canvas)
    pen, font = ImageDraw.Draw(tile), ImageFont.load_default(size=10)
    if "boxes" in batch:
        real = batch["label"][i] >= 0
        _outline(pen, batch["boxes"][i][real].float().cpu(), place, TRUE)
    keep = prediction.scores[i] >= LEAST
    boxes = prediction.boxes[i][keep].float().cpu()
    corners = _outline(pen, boxes, place, FOUND)
    for c, label, s in zip(corners, prediction.labels[i][keep].tolist(), prediction.scores[i][keep].tolist(), strict=True):
        name = names[label] if label < len(names) else str(label)
        pen.text((float(c[:, 0].max()) + 2, float(c[:, 1].min())), f"{name} {s:.2f}", FOUND, font)
    if "id" in batch:
        pen.text((4, 2), str(batch["id"][i]), (70, 76, 86), font)
    return tile


def _outline(pen: ImageDraw.ImageDraw, boxes: torch.Tensor, place: Any, colour: tuple[int, int, int]) -> list[np.ndarray]:
    """Each box's outline and a stroke from its centre to its front; the corners in pixels."""
    out = []
    for box, corners in zip(boxes, corners_bev(boxes), strict=True):
        c = place(corners.numpy())
        pen.polygon([tuple(p) for p in c.tolist()], outline=colour)
        front = (corners[0] + corners[3]) / 2
        pen.line([*place(box[:2].numpy()).tolist(), *place(front.numpy()).tolist()], fill=colour)
        out.append(c)
    return out


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Figure]:
    """Precision over recall of each class, as a figure by caption."""
    from matplotlib.figure import Figure

    from formarium.nn.ops.boxes import iou_bev
    from formarium.tasks.lidar_detection.metrics import _sweeps, _threshold, matched

    sweeps = [s for p, b in zip(predictions, batches, strict=True) for s in _sweeps(p, b)]
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for c in sorted({int(v) for s in sweeps for v in s["label"]}):
        truth = [s["boxes"][s["label"] == c] for s in sweeps]
        threshold = _threshold(torch.cat(truth))
        scores, right = [], []
        for s, t in zip(sweeps, truth, strict=True):
            own = s["said"] == c
            scores.append(s["scores"][own].numpy())
            right.append(matched(iou_bev(s["found"][own], t).numpy(), scores[-1], threshold) >= 0)
        hits = np.cumsum(np.concatenate(right)[np.argsort(-np.concatenate(scores), kind="stable")])
        if len(hits):
            label = f"{names[c] if c < len(names) else c} (IoU {threshold:g})"
            axes.plot(hits / sum(map(len, truth)), hits / np.arange(1, len(hits) + 1), label=label)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    if axes.lines:
        axes.legend(fontsize=8)
    return {"Precision over recall, seen from above": figure}
