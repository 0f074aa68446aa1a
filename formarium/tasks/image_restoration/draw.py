"""A picture of restored images: what came in, what came out, and what it should have been, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from formarium.tasks.image_restoration.metrics import border_of, compare, to_bytes

SIDE, CAPTION, PAD = 220, 20, 8
INK = (40, 44, 52)


def draw(prediction: Any, batch: Mapping[str, Any], most: int = 4) -> Image.Image:
    """Up to `most` rows of up to three pictures: degraded (its pixels as squares), restored, clean. Scores stand below where known."""
    restored, degraded = to_bytes(prediction.image[:most]), to_bytes(batch["image"][:most])
    clean = to_bytes(batch["target"][:most]) if "target" in batch else None
    columns = 3 if clean is not None else 2
    sheet = Image.new("RGB", (columns * (SIDE + PAD) + PAD, len(restored) * (SIDE + CAPTION + PAD) + PAD), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, image in enumerate(restored):
        texts = ["degraded", "restored"]
        pictures = [degraded[i], image]
        if clean is not None:
            scores = compare(image, clean[i], border_of(batch, i))
            texts = ["degraded", f"restored, {scores['psnr_y']:.2f} dB", "clean"]
            pictures.append(clean[i])
        for j, (values, text) in enumerate(zip(pictures, texts, strict=True)):
            x, y = PAD + j * (SIDE + PAD), PAD + i * (SIDE + CAPTION + PAD)
            sheet.paste(_tile(values), (x, y))
            pen.text((x, y + SIDE + 2), text, INK, font)
    return sheet


def _tile(values: np.ndarray) -> Image.Image:
    picture = Image.fromarray(np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values)
    scale = SIDE / max(picture.size)
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), resampling)
    tile = Image.new("RGB", (SIDE, SIDE), (236, 238, 240))
    tile.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return tile
