"""Pictures of detections, and each class's average precision."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from formarium.nn.mask_codes import paste_masks
from formarium.tasks.object_detection.metrics import average_precision, called, image_ids, results_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE, PAD = 224, 8


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 16, least: float = 0.3) -> Image.Image:
    """Up to 16 pictures with the boxes (and masks) above a score of 0.3; annotated boxes thin and white."""
    count = min(most, len(batch["image"]))
    tiles = [_tile(prediction, batch, names, i, least) for i in range(count)]
    columns = min(8, count)
    sheet = Image.new("RGB", (columns * (TILE + PAD) + PAD, -(-count // columns) * (TILE + PAD) + PAD), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (PAD + (i % columns) * (TILE + PAD), PAD + (i // columns) * (TILE + PAD)))
    return sheet


def _tile(prediction: Any, batch: Mapping[str, Any], names: Sequence[str], i: int, least: float) -> Image.Image:
    height, width = (int(v) for v in batch["size"][i])
    values = (batch["image"][i, :, :height, :width].float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    scale = TILE / max(height, width)
    shown = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(values).resize(shown, Image.Resampling.BILINEAR)
    original = batch["original_size"][i]
    ratio = prediction.boxes.new_tensor([shown[0] / float(original[1]), shown[1] / float(original[0])] * 2)
    kept = (prediction.scores[i] > least).nonzero().flatten().tolist()
    boxes = prediction.boxes[i].float() * ratio
    if prediction.masks is not None and kept:
        pasted = paste_masks(prediction.masks[i][kept].cpu(), boxes[kept].cpu(), shown[1], shown[0]).numpy()
        pixels = np.asarray(picture).astype(np.float32)
        for k, m in zip(kept, pasted, strict=True):
            pixels[m] = 0.5 * pixels[m] + 0.5 * np.array(colour(int(prediction.labels[i, k])))
        picture = Image.fromarray(pixels.astype(np.uint8))
    tile = Image.new("RGB", (TILE, TILE), (236, 238, 240))
    tile.paste(picture, (0, 0))
    pen, font = ImageDraw.Draw(tile), ImageFont.load_default(size=11)
    if "boxes" in batch and "labels" in batch:
        for (x, y, w, h), label in zip(batch["boxes"][i].tolist(), batch["labels"][i].tolist(), strict=True):
            if label >= 0:
                corners = ((x - w / 2) * shown[0], (y - h / 2) * shown[1], (x + w / 2) * shown[0], (y + h / 2) * shown[1])
                pen.rectangle(corners, outline=(255, 255, 255))
    for k in reversed(kept):
        label = int(prediction.labels[i, k])
        x0, y0, x1, y1 = boxes[k].tolist()
        pen.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=colour(label), width=2)
        text = f"{called(names, label)} {float(prediction.scores[i, k]):.0%}"
        pen.rectangle((x0, y0, x0 + pen.textlength(text, font) + 4, y0 + 13), fill=colour(label))
        pen.text((x0 + 2, y0), text, "white", font)
    return tile


def colour(label: int) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb((label * 0.381966) % 1, 0.8, 0.75)
    return int(255 * r), int(255 * g), int(255 * b)


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Figure]:
    """Each class's average precision as bars, the best 40."""
    from matplotlib.figure import Figure

    images = [i for b in batches for i in image_ids(b)]
    truths = [a for b in batches for sample in b["truth"] for a in sample]
    results = [r for p, b in zip(predictions, batches, strict=True) for r in results_of(p, b, masks=False)]
    found = average_precision(images, truths, results, per_class=True)
    if not found:
        return {}
    ranked = sorted(found.items(), key=lambda pair: -pair[1])[:40]
    figure = Figure(figsize=(7, 1 + 0.25 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    axes.barh([called(names, int(k)) for k, _ in ranked], [v for _, v in ranked], color="#2a9d8f")
    axes.invert_yaxis()
    axes.set_xlabel("average precision")
    return {"Average precision of each class": figure}
