"""Pictures of predictions: a contact sheet, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE, CAPTION, PAD = 128, 34, 10
INK, RIGHT, WRONG = (40, 44, 52), (0, 120, 100), (190, 60, 40)


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 16) -> Image.Image:
    """Up to 16 images with what the model says of each; where the label is known, the wrong ones say what was right."""
    return sheet(prediction, batch, names, most, _tile)


def sheet(
    prediction: Any, batch: Mapping[str, Any], names: Sequence[str], most: int, tile: Callable[[torch.Tensor], Image.Image]
) -> Image.Image:
    """The contact sheet: `tile` makes a picture, TILE pixels square, of each of the batch's samples."""
    probabilities = prediction.probabilities.float().cpu()
    names = names or [str(i) for i in range(probabilities.shape[1])]
    images = [x.float().cpu() for x in batch["image"][:most]]
    columns = min(8, len(images))
    lines = -(-len(images) // columns)
    board = Image.new("RGB", (columns * (TILE + PAD) + PAD, lines * (TILE + CAPTION + PAD) + PAD), "white")
    pen, font = ImageDraw.Draw(board), ImageFont.load_default(size=12)
    for i, image in enumerate(images):
        x, y = PAD + (i % columns) * (TILE + PAD), PAD + (i // columns) * (TILE + CAPTION + PAD)
        board.paste(tile(image), (x, y))
        said = int(probabilities[i].argmax())
        text = f"{_short(names[said])} {probabilities[i, said]:.0%}"
        if "label" not in batch:
            pen.text((x, y + TILE + 2), text, INK, font)
            continue
        true = int(batch["label"][i])
        pen.text((x, y + TILE + 2), text, RIGHT if said == true else WRONG, font)
        if said != true:
            pen.rectangle((x - 2, y - 2, x + TILE + 1, y + TILE + 1), outline=WRONG, width=2)
            pen.text((x, y + TILE + 17), f"is {_short(names[true])}", INK, font)
    return board


def _tile(image: torch.Tensor) -> Image.Image:
    values = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(values if values.shape[2] == 3 else np.repeat(values[..., :1], 3, axis=2))
    scale = TILE / max(picture.size)
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), resampling)
    tile = Image.new("RGB", (TILE, TILE), (236, 238, 240))
    tile.paste(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2))
    return tile


def _short(name: str, most: int = 12) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Figure]:
    """The confusion matrix as a figure, by caption."""
    from formarium.tasks.image_classification.metrics import joined

    probabilities, label = joined(predictions, batches)
    said, classes = probabilities.argmax(1), probabilities.shape[1]
    matrix = torch.bincount(label * classes + said, minlength=classes * classes).view(classes, classes).numpy()
    return {"Confusion (rows: true, columns: predicted)": draw_confusion(matrix, names)}


def draw_confusion(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """matrix: counts [true, predicted]. Colour is the share of a row; numbers are counts, where they fit."""
    from matplotlib.figure import Figure

    classes = len(matrix)
    size = min(9, 2.2 + 0.42 * classes)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="BuGn", vmin=0, vmax=1)
    if classes <= 20:
        for (i, j), count in np.ndenumerate(matrix):
            if count:
                axes.text(j, i, str(count), ha="center", va="center", fontsize=8, color="white" if shares[i, j] > 0.5 else "black")
    if classes <= 40:
        axes.set_xticks(range(classes), [_short(n) for n in names], rotation=90, fontsize=8)
        axes.set_yticks(range(classes), [_short(n) for n in names], fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure


def examples(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], most: int = 16) -> tuple[Any, dict[str, Any]]:
    """Samples to show: spread over the split, with up to six mistakes among them. Only batches that still hold their images count."""
    held = [i for i, b in enumerate(batches) if "image" in b]
    said = [torch.cat([getattr(predictions[i], k) for i in held]) for k in predictions[0]._fields]
    batch = {k: torch.cat([batches[i][k] for i in held]) for k in batches[held[0]] if torch.is_tensor(batches[held[0]][k])}
    seen = type(predictions[0])(*said)
    wrong = (seen.label != batch["label"]).nonzero().flatten()[:6].tolist() if "label" in batch else []
    spread = np.linspace(0, len(seen.label) - 1, most * 2).astype(int).tolist()
    chosen = [*dict.fromkeys([i for i in spread if i not in wrong][: most - len(wrong)] + wrong)]
    return type(seen)(*(v[chosen] for v in said)), {k: v[chosen] for k, v in batch.items()}
