"""Scores of class probabilities, predictions as plain rows, and the rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from formarium.errors import MissingExtra
from formarium.task import Data

NEAREST = "nearest neighbour, Euclidean"


def joined(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities [samples, classes], labels [samples]) on the CPU."""
    probabilities = torch.cat([p.probabilities for p in predictions]).float().cpu()
    return probabilities, torch.cat([b["label"] for b in batches]).cpu()


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """accuracy, log_loss (nats), both with one value a sample, and macro_f1."""
    from torchmetrics.functional.classification import multiclass_f1_score

    probabilities, label = joined(predictions, batches)
    per_sample = {
        "accuracy": (probabilities.argmax(1) == label).double().numpy(),
        "log_loss": -probabilities.gather(1, label[:, None])[:, 0].clamp_min(1e-12).log().double().numpy(),
    }
    metrics = {name: float(values.mean()) for name, values in per_sample.items()}
    metrics["macro_f1"] = float(multiclass_f1_score(probabilities, label, probabilities.shape[1], average="macro"))
    return metrics, per_sample


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str], top: int = 3) -> list[dict[str, Any]]:
    """One dict a sample: id, label, probability, the `top` likeliest classes, and the nearest stretches the model points at."""
    names = names or [str(i) for i in range(prediction.probabilities.shape[1])]
    best = prediction.probabilities.float().cpu().topk(min(top, len(names)))
    ids = batch.get("id") or [str(i) for i in range(len(best.values))]
    out = []
    for name, values, indices, matches in zip(ids, best.values.tolist(), best.indices.tolist(), prediction.matches, strict=True):
        ranked = [{"label": names[i], "probability": round(p, 6)} for p, i in zip(values, indices, strict=True)]
        shown = [{**m._asdict(), "label": names[m.label], "distance": round(m.distance, 6)} for m in matches[:top]]
        out.append({"id": name, **ranked[0], "top": ranked, "matches": shown})
    return out


# rivals -------------------------------------------------------------------------------------------------------------


def arrays(data: Data, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(series float32 [samples, channels, length], labels [samples]) of a split."""
    samples = [data.splits[split][i] for i in range(len(data.splits[split]))]
    return np.stack([s["series"] for s in samples]), np.array([s["label"] for s in samples])


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """The class of the training series with the least Euclidean distance over all channels, scored on "val"."""
    from sklearn.neighbors import KNeighborsClassifier

    (x, y), (test, label) = arrays(data, "train"), arrays(data, "val")
    model = KNeighborsClassifier(1).fit(x.reshape(len(x), -1), y)
    return NEAREST, {"accuracy": float((model.predict(test.reshape(len(test), -1)) == label).mean())}


def rocket(data: Data, seed: int = 0, kernels: int = 2000) -> dict[str, float]:
    """The field's strong rival: ROCKET (aeon's), random convolutions and a linear classifier, scored on "val"."""
    try:
        from aeon.classification.convolution_based import RocketClassifier
    except ImportError:
        raise MissingExtra("aeon", "series") from None
    (x, y), (test, label) = arrays(data, "train"), arrays(data, "val")
    model = RocketClassifier(n_kernels=kernels, random_state=seed).fit(x, y)
    return {"accuracy": float((model.predict(test) == label).mean())}
