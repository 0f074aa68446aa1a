"""Pictures of verdicts: a strip of frames a video with each frame's score, and the ROC curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from formarium.tasks.deepfake_detection.model import FAKE, NAMES
from formarium.tasks.image_classification.draw import INK, RIGHT, WRONG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE, PAD, LINE, BAR = 72, 8, 20, 22
SHOWN = 8  # frames of a video


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 8) -> Image.Image:
    """Up to 8 videos, a row each: what is said of it (and whether that is right, where it is known), up to 8 frames evenly spread, and
    under each how fake it looks."""
    frames = batch["frames"][:most].float().cpu()
    shown = np.unique(np.linspace(0, frames.shape[1] - 1, SHOWN).astype(int))
    width = max(220, len(shown) * (TILE + 2) + 2 * PAD)
    height = LINE + TILE + BAR + PAD
    sheet = Image.new("RGB", (width, len(frames) * height + PAD), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    ids = batch.get("id") or [""] * len(frames)
    for i, video in enumerate(frames):
        y, said = PAD + i * height, int(prediction.label[i])
        text, ink = f"{ids[i][-24:]}  {NAMES[said]}, fake score {float(prediction.fake[i]):.2f}", INK
        if "label" in batch:
            true = int(batch["label"][i])
            ink = RIGHT if said == true else WRONG
            text += "" if said == true else f" (is {NAMES[true]})"
        pen.text((PAD, y), text, ink, font)
        for j, t in enumerate(shown):
            x = PAD + j * (TILE + 2)
            values = (video[int(t)].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(values).resize((TILE, TILE), Image.Resampling.BILINEAR), (x, y + LINE))
            share = float(prediction.frames[i, int(t)])
            pen.rectangle((x, y + LINE + TILE + 2, x + TILE - 1, y + LINE + TILE + BAR - 6), fill=(236, 238, 240))
            if share > 0:
                pen.rectangle((x, y + LINE + TILE + 2, x + round((TILE - 1) * share), y + LINE + TILE + BAR - 6), fill=WRONG)
    return sheet


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> dict[str, Figure]:
    """The ROC curve as a figure, by caption; nothing where the videos are of one class."""
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_curve

    from formarium.tasks.deepfake_detection.metrics import joined

    fake, _, label = joined(predictions, batches)
    if len({*label.tolist()}) < 2:
        return {}
    false, true, _ = roc_curve(label == FAKE, fake)
    figure = Figure(figsize=(3.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.8")
    axes.plot(false, true, color=tuple(v / 255 for v in RIGHT))
    axes.set_xlabel("real videos called fake")
    axes.set_ylabel("fakes found")
    return {"ROC curve": figure}


def examples(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], most: int = 8) -> tuple[Any, dict[str, Any]]:
    """Videos to show: spread over the split, with up to three mistakes among them. Only batches that still hold their frames count."""
    held = [i for i, b in enumerate(batches) if "frames" in b]
    seen = type(predictions[0])(*(torch.cat([getattr(predictions[i], k) for i in held]) for k in predictions[0]._fields))
    batch: dict[str, Any] = {k: torch.cat([batches[i][k] for i in held]) for k in batches[held[0]] if torch.is_tensor(batches[held[0]][k])}
    ids = [name for i in held for name in batches[i]["id"]]
    wrong = (seen.label != batch["label"]).nonzero().flatten()[:3].tolist() if "label" in batch else []
    spread = np.linspace(0, len(seen.label) - 1, most * 2).astype(int).tolist()
    chosen = [*dict.fromkeys([i for i in spread if i not in wrong][: most - len(wrong)] + wrong)]
    shown = {k: v[chosen] for k, v in batch.items()}
    return type(seen)(*(v[chosen] for v in seen)), {**shown, "id": [ids[i] for i in chosen]}
