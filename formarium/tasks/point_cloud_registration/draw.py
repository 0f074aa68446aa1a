"""Pairs of clouds before and after registration, and the distribution of errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from formarium.nn.rigid import move

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE, PAD = 240, 8
SOURCE, TARGET, RIGHT, WRONG = (222, 120, 30), (40, 110, 190), (60, 160, 90), (200, 60, 60)
LINES = 40


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 16) -> Image.Image:
    """Up to 16 pairs: on the left as they came, with some correspondences (green where the true motion agrees, red where not); on the right
    with the source moved as predicted. Source orange, target blue, seen along the direction in which the target is thinnest."""
    count = min(most, len(batch["source_count"]))
    columns = min(2, count)
    lines = -(-count // columns)
    sheet = Image.new("RGB", (columns * 2 * (TILE + PAD) + PAD, lines * (TILE + PAD) + PAD), "white")
    for i in range(count):
        x, y = PAD + i % columns * 2 * (TILE + PAD), PAD + i // columns * (TILE + PAD)
        before, after = _tiles(prediction, batch, i)
        sheet.paste(before, (x, y))
        sheet.paste(after, (x + TILE + PAD, y))
    return sheet


def _tiles(prediction: Any, batch: Mapping[str, Any], i: int) -> tuple[Image.Image, Image.Image]:
    source, target = (batch[k][i, : int(batch[f"{k}_count"][i])].float().cpu() for k in ("source", "target"))
    motion = prediction.transform[i].float().cpu()
    axes = torch.linalg.svd(target - target.mean(0), full_matrices=False)[2][:2]  # 2 3
    beside = source - source.mean(0) + target.mean(0)  # as it came, but in sight
    shift = 1.15 * float((target @ axes[0]).max() - (target @ axes[0]).min())
    before, after = _canvas(), _canvas()
    flat = {"target": target @ axes.T, "source": beside @ axes.T + torch.tensor([shift, 0.0])}
    place = _place(torch.cat([*flat.values()]))
    _dots(before, place(flat["target"]), TARGET)
    _dots(before, place(flat["source"]), SOURCE)
    pen = ImageDraw.Draw(before)
    a, b = prediction.source[i].float().cpu(), prediction.target[i].float().cpu()
    chosen = np.linspace(0, len(a) - 1, min(LINES, len(a))).astype(int)
    start = place((a[chosen] - source.mean(0) + target.mean(0)) @ axes.T + torch.tensor([shift, 0.0]))
    end = place(b[chosen] @ axes.T)
    right = torch.ones(len(chosen), dtype=torch.bool)
    if "transform" in batch:
        right = (move(batch["transform"][i].float().cpu(), a[chosen]) - b[chosen]).norm(dim=1) < 0.1
    for p, q, ok in zip(start, end, right.tolist(), strict=True):
        pen.line([*p, *q], fill=RIGHT if ok else WRONG)
    moved = move(motion, source) @ axes.T
    place = _place(torch.cat([flat["target"], moved]))
    _dots(after, place(flat["target"]), TARGET)
    _dots(after, place(moved), SOURCE)
    if "id" in batch:
        pen.text((4, 2), str(batch["id"][i]), (70, 76, 86), ImageFont.load_default(size=10))
    return before, after


def _canvas() -> Image.Image:
    return Image.new("RGB", (TILE, TILE), (250, 250, 250))


def _place(points: torch.Tensor) -> Any:
    low, high = points.amin(0), points.amax(0)
    middle, half = (low + high) / 2, max(float((high - low).max()) / 2, 1e-6) * 1.06

    def place(p: torch.Tensor) -> list[tuple[float, float]]:
        return [(x, y) for x, y in (((p - middle) / half * torch.tensor([1.0, -1.0]) + 1) * TILE / 2).tolist()]

    return place


def _dots(tile: Image.Image, spots: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
    pen = ImageDraw.Draw(tile)
    for x, y in spots[:4000]:
        pen.rectangle((x, y, x + 1, y + 1), fill=colour)


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Figure]:
    """How many pairs are within an error of rotation, as a figure by caption."""
    from matplotlib.figure import Figure

    from formarium.tasks.point_cloud_registration.metrics import score

    errors = np.sort(score(predictions, batches)[1]["rre"]).clip(1e-3)
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.step(errors, np.arange(1, len(errors) + 1) / len(errors), where="post")
    axes.set(xlabel="rotation error, degrees", ylabel="share of pairs", xscale="log", ylim=(0, 1.02))
    return {"Pairs within a rotation error": figure}
