"""Scores of label maps, predictions as plain rows, and the trivial rival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formarium.errors import BadInput
from formarium.task import Data
from formarium.tasks.semantic_segmentation.model import IGNORE

WINDOW, PIXELS = 5, 20_000  # of the rival: the neighbourhood it sees, the pixels it learns from


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """miou: intersection over union of each class over all pixels, the mean over classes that occur (in truth or prediction).
    pixel_accuracy; class_accuracy: the mean over classes of the share of their pixels that is right. Per sample: pixel_accuracy."""
    if any("label" not in b for b in batches):
        raise BadInput("batch", expected="label maps (label)", got="none", fix="evaluate on labelled data")
    classes = 1 + max(int(x.max()) for p, b in zip(predictions, batches, strict=True) for x in (p.label, b["label"]))
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    shares = []
    for p, b in zip(predictions, batches, strict=True):
        for said, true in zip(p.label.long(), b["label"].cpu(), strict=True):
            own = confusion(said, true, classes)
            matrix += own
            shares.append(float(own.diag().sum()) / max(1, int(own.sum())))
    hit, true, said = matrix.diag().double(), matrix.sum(1).double(), matrix.sum(0).double()
    union = true + said - hit
    return {
        "miou": float((hit / union)[union > 0].mean()),
        "pixel_accuracy": float(hit.sum() / matrix.sum().clamp_min(1)),
        "class_accuracy": float((hit / true)[true > 0].mean()),
    }, {"pixel_accuracy": np.array(shares)}


def confusion(said: Tensor, true: Tensor, classes: int) -> Tensor:
    """Pixels by (true, said) class, int64 [classes, classes]; pixels without class aside."""
    known = true != IGNORE
    return torch.bincount(classes * true[known] + said[known], minlength=classes * classes).view(classes, classes)


def per_class(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], classes: int) -> Tensor:
    """Intersection over union by class, float64 [classes], NaN where a class occurs nowhere."""
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for p, b in zip(predictions, batches, strict=True):
        matrix += confusion(p.label.long(), b["label"].cpu(), classes)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diag()
    return matrix.diag().double() / union.double()


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a picture: the share of it that each class has, largest first, and the mean confidence."""
    out = []
    for i, name in enumerate(batch["id"]):
        h, w = (int(v) for v in batch["size"][i])
        counts = prediction.label[i, :h, :w].long().flatten().bincount()
        order = [int(c) for c in counts.argsort(descending=True) if counts[c]]
        shares = {names[c] if c < len(names) else str(c): round(float(counts[c]) / (h * w), 4) for c in order}
        confidence = round(float(prediction.confidence[i, :h, :w].mean()), 4)
        out.append({"id": name, "main_class": next(iter(shares)), "confidence": confidence, "shares": shares})
    return out


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """A linear classifier of the mean and deviation of colour around each pixel."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from formarium.tasks.semantic_segmentation.model import Segments

    rng = np.random.default_rng(seed)
    train, held = data.splits["train"], data.splits["val"]
    each = max(1, PIXELS // len(train))
    x, y = [], []
    for i in range(len(train)):
        s = train[i]
        known = np.flatnonzero(s["label"].reshape(-1) != IGNORE)
        at = rng.choice(known, min(each, len(known)), replace=False)
        x.append(_around(s["image"])[at])
        y.append(s["label"].reshape(-1)[at])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(np.concatenate(x), np.concatenate(y))
    predictions, batches = [], []
    for i in range(len(held)):
        s = held[i]
        said = torch.from_numpy(classifier.predict(_around(s["image"])).reshape(s["label"].shape)).long()
        predictions.append(Segments(said[None].short(), torch.ones_like(said[None], dtype=torch.float32)))
        batches.append({"label": torch.from_numpy(s["label"])[None]})
    return f"a linear classifier of colour in {WINDOW}x{WINDOW} pixels", score(predictions, batches)[0]


def _around(image: np.ndarray) -> np.ndarray:
    """Mean and deviation of each channel around each pixel, float32 [pixels, 6]."""
    from scipy.ndimage import uniform_filter

    from formarium.tasks.image_classification.data import array_to_rgb

    values = array_to_rgb(image).astype(np.float32) / 255
    mean = uniform_filter(values, (WINDOW, WINDOW, 0))
    spread = np.sqrt(np.maximum(uniform_filter(values**2, (WINDOW, WINDOW, 0)) - mean**2, 0))
    return np.concatenate([mean, spread], -1).reshape(-1, 6)
