"""Pictures of predictions: image, map over it, the box and where the truth is known that too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from formarium.nn.map_boxes import enlarge, min_max

TILE, CAPTION, PAD = 128, 34, 10
INK, RIGHT, WRONG, TRUE = (40, 44, 52), (0, 120, 100), (190, 60, 40), (255, 255, 255)


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 16) -> Image.Image:
    """Up to 16 images, two tiles each: the image with its box (true ones in white), and the map laid over it."""
    from formarium.tasks.object_localisation.metrics import best_overlap

    names = names or [str(i) for i in range(prediction.probabilities.shape[1])]
    images = batch["image"][:most].float().cpu()
    columns = min(4, len(images))
    lines = -(-len(images) // columns)
    step = (2 * TILE + 2 * PAD, TILE + CAPTION + PAD)
    sheet = Image.new("RGB", (columns * step[0] + PAD, lines * step[1] + PAD), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    heat = min_max(enlarge(prediction.map[: len(images)].cpu(), (TILE, TILE))).numpy()
    boxes = prediction.box[: len(images)].float().cpu()
    truth = batch["boxes"][: len(images)].float().cpu() if "boxes" in batch else None
    for i, image in enumerate(images):
        x, y = PAD + (i % columns) * step[0], PAD + (i // columns) * step[1]
        scale = torch.tensor([TILE / image.shape[2], TILE / image.shape[1]] * 2)
        picture = _tile(image)
        marks = ImageDraw.Draw(picture)
        overlap = None
        if truth is not None:
            overlap = float(best_overlap(boxes[i], truth[i]))
            for box in truth[i][~truth[i].isnan().any(1)]:
                marks.rectangle([*(box * scale).round().clamp(0, TILE - 1).tolist()], outline=TRUE, width=2)
        colour = INK if overlap is None else RIGHT if overlap >= 0.5 else WRONG
        marks.rectangle([*(boxes[i] * scale).round().clamp(0, TILE - 1).tolist()], outline=colour, width=2)
        sheet.paste(picture, (x, y))
        sheet.paste(_heat(_tile(image), heat[i]), (x + TILE + 4, y))
        said = int(prediction.probabilities[i].argmax())
        pen.text((x, y + TILE + 2), f"{names[said][:24]} {float(prediction.probabilities[i, said]):.0%}", INK, font)
        if overlap is not None:
            pen.text((x, y + TILE + 17), f"overlap {overlap:.2f}", colour, font)
    return sheet


def _tile(image: torch.Tensor) -> Image.Image:
    values = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(values if values.shape[2] == 3 else np.repeat(values[..., :1], 3, axis=2))
    return picture.resize((TILE, TILE), Image.Resampling.BILINEAR)


def _heat(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture in grey, warm where the map is high."""
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    warm = np.stack([np.ones_like(heat), 1 - 0.75 * heat, 0.25 * (1 - heat)], -1) * 255
    weight = 0.65 * heat[..., None]
    return Image.fromarray(((1 - weight) * grey + weight * warm).clip(0, 255).astype(np.uint8))
