"""Pictures of poses over what was cut out, and each joint's errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from formarium.tasks.human_pose.joints import JOINTS, LIMBS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT, PAD = 224, 8
LEFT, RIGHT, MIDDLE, TRUE = (235, 110, 50), (50, 120, 230), (60, 170, 90), (255, 255, 255)


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 16) -> Image.Image:
    """Up to 16 people with their skeletons; annotated joints as small white rings."""
    images = batch["image"][:most].float().cpu()
    count, _, h, w = images.shape
    scale = HEIGHT / h
    width = max(1, round(w * scale))
    columns = min(8, count)
    sheet = Image.new("RGB", (columns * (width + PAD) + PAD, -(-count // columns) * (HEIGHT + PAD) + PAD), "white")
    for i, image in enumerate(images):
        values = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        tile = Image.fromarray(values).resize((width, HEIGHT), Image.Resampling.BILINEAR)
        pen = ImageDraw.Draw(tile)
        corner = batch["centre"][i] - batch["extent"][i] / 2
        size = prediction.keypoints.new_tensor([w - 1, h - 1])
        at = (prediction.keypoints[i].cpu() - corner.cpu()) / batch["extent"][i].cpu() * size.cpu() * scale
        _skeleton(pen, at.tolist(), prediction.scores[i].tolist())
        if "keypoints" in batch:
            for (x, y), seen in zip((batch["keypoints"][i].cpu() * scale).tolist(), batch["visible"][i].tolist(), strict=True):
                if seen:
                    pen.ellipse((x - 3, y - 3, x + 3, y + 3), outline=TRUE)
        sheet.paste(tile, (PAD + (i % columns) * (width + PAD), PAD + (i // columns) * (HEIGHT + PAD)))
    return sheet


def _skeleton(pen: ImageDraw.ImageDraw, at: Sequence[Sequence[float]], scores: Sequence[float], least: float = 0.1) -> None:
    if len(at) == 17:
        for a, b in LIMBS:
            if min(scores[a], scores[b]) >= least:
                pen.line((*at[a], *at[b]), fill=_side(a, b), width=3)
    for (x, y), value in zip(at, scores, strict=True):
        if value >= least:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(30, 30, 30))


def _side(a: int, b: int) -> tuple[int, int, int]:
    sides = {JOINTS[j].split("_")[0] for j in (a, b)} - {"nose"}
    return LEFT if sides == {"left"} else RIGHT if sides == {"right"} else MIDDLE


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Figure]:
    """Each joint's median distance from its place, in shares of the box's longer side."""
    from matplotlib.figure import Figure

    distances: list[list[float]] = []
    for prediction, batch in zip(predictions, batches, strict=True):
        if "keypoints" not in batch:
            continue
        for pose, sample, box in zip(prediction.keypoints.float().numpy(), batch["truth"], batch["box"].numpy(), strict=True):
            true = np.array(sample[0]["keypoints"]).reshape(-1, 3)
            far = np.linalg.norm(pose - true[:, :2], axis=1) / max(box[2], box[3])
            distances.append(np.where(true[:, 2] > 0, far, np.nan).tolist())
    if not distances:
        return {}
    values = np.array(distances)
    shown = [j for j in range(values.shape[1]) if np.isfinite(values[:, j]).any()]
    labels = names if len(names) == values.shape[1] else [str(j) for j in range(values.shape[1])]
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(shown)), [100 * float(np.nanmedian(values[:, j])) for j in shown], color="#2a9d8f")
    axes.set_xticks(range(len(shown)), [labels[j].replace("_", " ") for j in shown], rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("median error, % of the box")
    return {"Error of each joint": figure}
