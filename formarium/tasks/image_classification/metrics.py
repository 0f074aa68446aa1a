"""Scores of class probabilities, predictions as plain rows, and the trivial rival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from formarium.task import Data


def joined(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities [samples, classes], labels [samples]) on the CPU."""
    probabilities = torch.cat([p.probabilities for p in predictions]).float().cpu()
    return probabilities, torch.cat([b["label"] for b in batches]).cpu()


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """accuracy and top5 (shares of samples), macro_f1, log_loss (nats), calibration_error (15 bins).

    The first two and log_loss come with one value a sample, for bootstrapping.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

    probabilities, label = joined(predictions, batches)
    classes = probabilities.shape[1]
    rank = (probabilities > probabilities.gather(1, label[:, None])).sum(1)
    per_sample = {
        "accuracy": (rank == 0).double().numpy() * (probabilities.argmax(1) == label).double().numpy(),
        "top5": (rank < 5).double().numpy(),
        "log_loss": -probabilities.gather(1, label[:, None])[:, 0].clamp_min(1e-12).log().double().numpy(),
    }
    metrics = {name: float(values.mean()) for name, values in per_sample.items()}
    metrics["macro_f1"] = float(multiclass_f1_score(probabilities, label, classes, average="macro"))
    metrics["calibration_error"] = float(multiclass_calibration_error(probabilities, label, classes, n_bins=15))
    return metrics, per_sample


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str], top: int = 3) -> list[dict[str, Any]]:
    """One dict a sample: id, label (its name), probability, and the `top` likeliest classes."""
    names = names or [str(i) for i in range(prediction.probabilities.shape[1])]
    best = prediction.probabilities.float().cpu().topk(min(top, len(names)))
    ids = batch.get("id") or [str(i) for i in range(len(best.values))]
    out = []
    for name, values, indices in zip(ids, best.values.tolist(), best.indices.tolist(), strict=True):
        ranked = [{"label": names[i], "probability": round(p, 6)} for p, i in zip(values, indices, strict=True)]
        out.append({"id": name, **ranked[0], "top": ranked})
    return out


def baseline(data: Data, seed: int = 0, side: int = 32, most: int = 4000) -> tuple[str, dict[str, float]]:
    """Logistic regression on raw pixels (no larger than 32x32, at most 4000 training images), scored on "val"."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from formarium.tasks.image_classification.augment import Prepare

    prepare, rng = Prepare({"size": side, "crop": 1.0}), np.random.default_rng(seed)

    def pixels(split: str) -> tuple[np.ndarray, np.ndarray]:
        dataset = data.splits[split]
        chosen = rng.permutation(len(dataset))[:most] if split == "train" else np.arange(len(dataset))
        samples = [prepare(dataset[int(i)], rng) for i in chosen]
        flat = np.stack([s["image"][:, ::2, ::2].ravel() for s in samples])  # 16x16: as good, four times as fast
        return flat, np.array([s["label"] for s in samples])

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, C=0.01))
    model.fit(*pixels("train"))
    x, label = pixels("val")
    return "logistic regression on raw pixels", {"accuracy": float((model.predict(x) == label).mean())}
