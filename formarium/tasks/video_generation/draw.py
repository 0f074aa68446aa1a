"""Pictures of generated clips: film strips, generated frames framed in colour, the true ones below where they are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from formarium.tasks.video_generation.data import to_uint8

PAD, CAPTION, TILE = 6, 16, 64
INK, MADE = (40, 44, 52), (0, 120, 100)


def draw(prediction: Any, batch: Mapping[str, Any], most: int = 6, columns: int = 16) -> Image.Image:
    """Up to `most` clips, a line each (frames at even distances where there are more than `columns`), and a line with the truth."""
    count = min(most, len(prediction.video))
    frames = prediction.video.shape[1]
    shown = np.unique(np.linspace(0, frames - 1, min(columns, frames)).round().astype(int))
    true = batch.get("video")
    if true is not None and tuple(true.shape) != tuple(prediction.video.shape):
        true = None
    lines = 1 if true is None else 2
    step = TILE + PAD
    sheet = Image.new("RGB", (PAD + len(shown) * step, count * (CAPTION + lines * step) + PAD), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    ids = batch.get("id") or [str(i) for i in range(count)]
    for i in range(count):
        top = i * (CAPTION + lines * step) + PAD // 2
        pen.text((PAD, top), f"{str(ids[i])[:60]}: framed frames are generated" + ("; true ones below" if lines == 2 else ""), INK, font)
        made = prediction.mask[i].flatten(1).amax(1).bool().tolist()
        for line, video in enumerate([prediction.video[i]] if true is None else [prediction.video[i], true[i]]):
            pixels = to_uint8(video)
            for column, t in enumerate(shown):
                x, y = PAD + column * step, top + CAPTION + line * step
                sheet.paste(Image.fromarray(pixels[t]).resize((TILE, TILE), Image.Resampling.NEAREST), (x, y))
                if line == 0 and made[t]:
                    pen.rectangle((x - 2, y - 2, x + TILE + 1, y + TILE + 1), outline=MADE, width=2)
    return sheet
