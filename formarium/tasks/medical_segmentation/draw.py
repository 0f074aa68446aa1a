"""A picture of segmented volumes: the slice with most in it, with what the model found and what is true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from formarium.tasks.medical_segmentation.metrics import dice, truth
from formarium.tasks.medical_segmentation.model import Rebuilt

SIDE, CAPTION, PAD = 220, 20, 8
INK = (40, 44, 52)
COLOURS = np.array([(230, 90, 60), (60, 140, 230), (250, 200, 50), (90, 180, 110), (170, 100, 200), (80, 200, 200)], dtype=np.float64)


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 4) -> Image.Image:
    """Up to `most` rows: the last channel, the prediction's masks over it, the true ones where known. Smaller regions lie above larger.

    Of an encoder in pre-training: the last channel as it was, as the encoder saw it, as it was rebuilt.
    """
    if isinstance(prediction, Rebuilt):
        return _draw_rebuilt(prediction, most)
    images, masks = batch["image"][:most].float().cpu().numpy(), prediction.mask[:most].cpu().numpy()
    known = "label" in batch
    count = masks.shape[1]
    sheet = Image.new("RGB", ((2 + known) * (SIDE + PAD) + PAD, len(images) * (SIDE + CAPTION + PAD) + PAD + CAPTION), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, image in enumerate(images):
        regions = batch["regions"][i] if "regions" in batch else ()
        real = truth(batch["label"][i], regions, count) if known and (regions or "regions" in batch) else None
        at = _slice(real if real is not None and real.any() else masks[i])
        pictures = [(image[-1], None, "image"), (image[-1], masks[i], "found")]
        if real is not None:
            mean = np.mean([dice(m, t) for m, t in zip(masks[i], real, strict=True)])
            pictures = [pictures[0], (image[-1], masks[i], f"found, Dice {mean:.2f}"), (image[-1], real, "true")]
        for j, (grey, over, text) in enumerate(pictures):
            x, y = PAD + j * (SIDE + PAD), PAD + i * (SIDE + CAPTION + PAD)
            sheet.paste(_tile(_overlay(_at(grey, at), None if over is None else np.stack([_at(m, at) for m in over]))), (x, y))
            pen.text((x, y + SIDE + 2), text, INK, font)
    x, y = PAD, sheet.height - CAPTION
    for r, name in enumerate([*names][: min(count, 6)]):
        pen.rectangle((x, y + 2, x + 10, y + 12), fill=tuple(int(v) for v in COLOURS[r % len(COLOURS)]))
        pen.text((x + 14, y), name, INK, font)
        x += 24 + int(pen.textlength(name, font))
    return sheet


def _draw_rebuilt(prediction: Rebuilt, most: int) -> Image.Image:
    columns = [("volume", prediction.whole), ("seen", prediction.damaged), ("rebuilt", prediction.image)]
    count = min(most, len(prediction.whole))
    sheet = Image.new("RGB", (len(columns) * (SIDE + PAD) + PAD, count * (SIDE + CAPTION + PAD) + PAD), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i in range(count):
        for j, (text, values) in enumerate(columns):
            x, y = PAD + j * (SIDE + PAD), PAD + i * (SIDE + CAPTION + PAD)
            grey = values[i, -1].detach().float().cpu().numpy()
            sheet.paste(_tile(_overlay(grey if grey.ndim == 2 else grey[..., grey.shape[-1] // 2], None)), (x, y))
            pen.text((x, y + SIDE + 2), text, INK, font)
    return sheet


def _slice(masks: np.ndarray) -> int | None:
    """Of the last axis of volumes, the slice with most labelled voxels."""
    if masks.ndim == 3:
        return None
    counts = masks.any(0).sum((0, 1))
    return int(counts.argmax()) if counts.any() else masks.shape[-1] // 2


def _at(values: np.ndarray, at: int | None) -> np.ndarray:
    return values if at is None else values[..., at]


def _overlay(grey: np.ndarray, masks: np.ndarray | None) -> np.ndarray:
    low, high = np.percentile(grey, [1, 99.5])
    shade = ((grey - low) / max(high - low, 1e-6)).clip(0, 1)
    picture = np.repeat(shade[..., None] * 255, 3, axis=2)
    if masks is not None:
        for r in sorted(range(len(masks)), key=lambda r: -int(masks[r].sum())):
            picture[masks[r]] = 0.45 * picture[masks[r]] + 0.55 * COLOURS[r % len(COLOURS)]
    return picture.astype(np.uint8)


def _tile(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    scale = SIDE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.NEAREST)
    tile = Image.new("RGB", (SIDE, SIDE), (236, 238, 240))
    tile.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return tile
