"""Scores of slides' probabilities, predictions as plain rows, attention as tables, and the trivial rival."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from formarium.task import Data, file_stem


def joined(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities float64 [slides, classes], labels int64 [slides])."""
    p = np.concatenate([q.probabilities.float().cpu().numpy() for q in predictions]).astype(np.float64)
    return p, np.concatenate([b["label"].cpu().numpy() for b in batches])


def auc(probabilities: np.ndarray, label: np.ndarray) -> float:
    """Area under the ROC curve: of the second class for two, else the mean of one class against the rest over the classes that occur;
    0.5 where there is one class only, which says nothing."""
    from sklearn.metrics import roc_auc_score

    present = [c for c in range(probabilities.shape[1]) if 0 < (label == c).sum() < len(label)]
    if not present:
        return 0.5
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(label == 1, probabilities[:, 1]))
    return float(np.mean([roc_auc_score(label == c, probabilities[:, c]) for c in present]))


def balanced_accuracy(said: np.ndarray, label: np.ndarray) -> float:
    """The mean over classes of the share that is recognised."""
    return float(np.mean([(said[label == c] == c).mean() for c in np.unique(label)]))


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """auc, balanced_accuracy, accuracy, log_loss (nats); the last two with one value a slide, for bootstrapping."""
    p, label = joined(predictions, batches)
    said = p.argmax(1)
    per_sample = {
        "accuracy": (said == label).astype(np.float64),
        "log_loss": -np.log(np.clip(p[np.arange(len(label)), label], 1e-12, 1)),
    }
    metrics = {"auc": auc(p, label), "balanced_accuracy": balanced_accuracy(said, label)}
    return {**metrics, **{k: float(v.mean()) for k, v in per_sample.items()}}, per_sample


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str], most: int = 5) -> list[dict[str, Any]]:
    """One dict a slide: id, label (its name), probability, every class's probability, and the tiles that counted most."""
    p, attention = prediction.probabilities.float().cpu(), prediction.attention.float().cpu()
    names = names or [str(i) for i in range(p.shape[1])]
    ids = batch.get("id") or [str(i) for i in range(len(p))]
    mask, coords = batch["mask"].cpu(), batch["coords"].cpu()
    out = []
    for i, name in enumerate(ids):
        real = int(mask[i].sum())
        best = attention[i].topk(min(most, real))
        tiles = [
            {"tile": t, "x": coords[i, t, 0].item(), "y": coords[i, t, 1].item(), "attention": round(a, 6)}
            for a, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        at = int(p[i].argmax())
        every = {str(n): round(v, 6) for n, v in zip(names, p[i].tolist(), strict=True)}
        out.append({"id": name, "label": names[at], "probability": round(float(p[i, at]), 6), "probabilities": every, "tiles": tiles})
    return out


def write_attention(prediction: Any, batch: Mapping[str, Any], folder: Path) -> list[Path]:
    """NAME.csv a slide: x, y, attention of every real tile."""
    paths = []
    for i, name in enumerate(batch["id"]):
        paths.append(folder / f"{file_stem(name)}.csv")
        with open(paths[-1], "w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f)
            writer.writerow(["x", "y", "attention"])
            for t in batch["mask"][i].nonzero()[:, 0].tolist():
                x, y = batch["coords"][i, t].tolist()
                writer.writerow([f"{x:g}", f"{y:g}", f"{float(prediction.attention[i, t]):.8g}"])
    return paths


def descriptor(sample: Mapping[str, Any], side: int = 8) -> np.ndarray:
    """The mean over a slide's tiles: of their features, or of their pixels at 8x8. float [width]."""
    if "features" in sample:
        return sample["features"].mean(0)
    mean = sample["tiles"].astype(np.float32).mean(0) / 255  # h w 3
    rows, columns = ([*pairwise(np.linspace(0, n, side + 1).astype(int))] for n in mean.shape[:2])
    return np.stack([mean[a:b, c:d].mean((0, 1)) for a, b in rows for c, d in columns]).ravel()


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """Logistic regression on each slide's mean tile (or mean feature), scored on "val"."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def table(split: str) -> tuple[np.ndarray, np.ndarray]:
        dataset = data.splits[split]
        samples = [dataset[i] for i in range(len(dataset))]
        return np.stack([descriptor(s) for s in samples]), np.array([s["label"] for s in samples])

    x, y = table("train")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500, random_state=seed))
    model.fit(x, y)
    held, label = table("val")
    p = np.zeros((len(held), len(data.names)))
    p[:, model.classes_] = model.predict_proba(held)
    return "mean pooling and logistic regression", {"auc": auc(p, label), "balanced_accuracy": balanced_accuracy(p.argmax(1), label)}
