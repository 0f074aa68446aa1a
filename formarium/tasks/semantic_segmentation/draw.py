"""Pictures of label maps: the picture, what was found over it, what is true; and a figure of each class's score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from formarium.tasks.semantic_segmentation.metrics import per_class
from formarium.tasks.semantic_segmentation.model import IGNORE

TALL, PAD, CAPTION = 160, 8, 18
INK = (40, 44, 52)


@cache
def palette() -> np.ndarray:
    """A colour a class, uint8 [256, 3]: hues a golden angle apart, so that neighbours differ."""
    import colorsys

    colours = [colorsys.hsv_to_rgb((i * 0.61803) % 1, 0.75 - 0.25 * (i // 12 % 2), 0.95 - 0.2 * (i // 6 % 2)) for i in range(255)]
    return np.array([*([round(255 * v) for v in c] for c in colours), [0, 0, 0]], dtype=np.uint8)


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 4) -> Image.Image:
    """Up to `most` rows: the picture, the classes found over it, and the true ones where known; a legend below."""
    known = "label" in batch
    rows, seen = [], set()
    for i in range(min(most, len(batch["id"]))):
        h, w = (int(v) for v in batch["size"][i])
        image = (batch["image"][i, :, :h, :w].float().cpu().numpy().transpose(1, 2, 0) * 255).clip(0, 255).astype(np.uint8)
        labels = [prediction.label[i, :h, :w].cpu().numpy().astype(int)]
        if known:
            labels.append(batch["label"][i, :h, :w].cpu().numpy())
        seen |= {int(v) for x in labels for v in np.unique(x) if v != IGNORE}
        rows.append([image, *(_over(image, x) for x in labels)])
    size = (round(TALL * max(r[0].shape[1] / r[0].shape[0] for r in rows)), TALL)
    classes = sorted(seen)
    columns = 2 + known
    sheet = Image.new("RGB", (columns * (size[0] + PAD) + PAD, len(rows) * (TALL + PAD) + PAD + CAPTION * (2 + len(classes) // 3)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for j, text in enumerate(("picture", "found", "true")[:columns]):
        pen.text((PAD + j * (size[0] + PAD), 2), text, INK, font)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(
                Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), (PAD + j * (size[0] + PAD), CAPTION + i * (TALL + PAD))
            )
    top, wide = CAPTION + len(rows) * (TALL + PAD), (sheet.width - PAD) // 3
    for k, c in enumerate(classes):
        x, y = PAD + (k % 3) * wide, top + (k // 3) * CAPTION
        pen.rectangle((x, y + 3, x + 10, y + 13), fill=tuple(int(v) for v in palette()[c]))
        pen.text((x + 15, y), (names[c] if c < len(names) else str(c))[:20], INK, font)
    return sheet


def _over(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    tint = palette()[np.where(label == IGNORE, 255, label)]
    return np.where((label == IGNORE)[..., None], image // 2, (0.35 * image + 0.65 * tint).astype(np.uint8)).astype(np.uint8)


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Figure]:
    """A bar a class: its intersection over union, worst first."""
    classes = max(len(names), 1 + max(int(x.max()) for p, b in zip(predictions, batches, strict=True) for x in (p.label, b["label"])))
    values = per_class(predictions, batches, classes).numpy()
    order = [int(c) for c in np.argsort(values) if values[c] == values[c]][:40]
    figure = Figure(figsize=(6.4, 0.8 + 0.24 * len(order)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(order)), values[order], color="#0f766e")
    axes.set_yticks(range(len(order)), [names[c] if c < len(names) else str(c) for c in order], fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_xlabel("intersection over union")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return {"Each class": figure}
