"""Pictures of predictions: a contact sheet (of a volume its three middle slices), ROC curves, the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from formarium.tasks.image_classification.draw import TILE, draw_confusion, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 16) -> Image.Image:
    """Up to 16 samples with what the model says of each; where the label is known, the wrong ones say what was right."""
    return sheet(prediction, batch, names, most, tile)


def tile(image: torch.Tensor, side: int = TILE) -> Image.Image:
    """An image [channels, h, w], or of a volume [channels, h, w, d] the middle slices across each axis, in a square."""
    board = Image.new("RGB", (side, side), (236, 238, 240))
    if image.ndim == 3:
        board.paste(_fitted(image, side, side), (0, 0))
        return board
    volume = image.mean(0)  # h w d
    h, w, d = (n // 2 for n in volume.shape)
    half = side // 2 - 1
    for place, piece in (((0, 0), volume[:, :, d]), ((half + 2, 0), volume[:, w]), ((0, half + 2), volume[h].T)):
        board.paste(_fitted(piece[None], half, half), place)
    return board


def _fitted(image: torch.Tensor, width: int, height: int) -> Image.Image:
    values = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(values if values.shape[2] == 3 else np.repeat(values[..., :1], 3, axis=2))
    scale = min(width / picture.width, height / picture.height)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), how)


def examples(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], most: int = 16) -> tuple[Any, dict[str, Any]]:
    """Samples to show: spread over the split, with up to six mistakes among them. Only batches that still hold their images count."""
    held = [i for i, b in enumerate(batches) if "image" in b]
    probabilities, label = (torch.cat([getattr(predictions[i], k) for i in held]) for k in ("probabilities", "label"))
    images = [x for i in held for x in batches[i]["image"]]
    ids = [x for i in held for x in batches[i]["id"]]
    known = {k: torch.cat([batches[i][k] for i in held]) for k in ("label", "rank") if k in batches[held[0]]}
    wrong = (label != known["label"]).nonzero().flatten()[:6].tolist() if "label" in known else []
    spread = np.linspace(0, len(images) - 1, most * 2).astype(int).tolist()
    chosen = [*dict.fromkeys([i for i in spread if i not in wrong][: most - len(wrong)] + wrong)]
    batch = {"image": [images[i] for i in chosen], "id": [ids[i] for i in chosen], **{k: v[chosen] for k, v in known.items()}}
    return type(predictions[0])(probabilities[chosen], label[chosen]), batch


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Figure]:
    """ROC curves (one a class, or of class 1 where there are two) and the confusion matrix, by caption."""
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_curve

    from formarium.tasks.medical_classification.metrics import auc, joined

    probabilities, label, _ = joined(predictions, batches)
    classes = probabilities.shape[1]
    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    for k in [1] if classes == 2 else range(min(classes, 10)):
        if 0 < (label == k).sum() < len(label):
            false, true, _ = roc_curve(label == k, probabilities[:, k])
            axes.plot(false, true, label=names[k] if names else str(k))
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    matrix = np.zeros((classes, classes), dtype=int)
    np.add.at(matrix, (label, probabilities.argmax(1)), 1)
    return {
        f"ROC curves (area {auc(probabilities, label):.3f})": figure,
        "Confusion (rows: true, columns: predicted)": draw_confusion(matrix, names or [str(i) for i in range(classes)]),
    }
