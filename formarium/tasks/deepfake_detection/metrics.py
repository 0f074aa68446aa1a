"""Scores of verdicts on videos, verdicts as plain rows, and the trivial rival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from formarium.task import Data
from formarium.tasks.deepfake_detection.model import FAKE, NAMES


def joined(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(how fake each video is said to be, what it is said to be, what it is)"""
    fake = torch.cat([p.fake for p in predictions]).float().cpu().numpy()
    said = torch.cat([p.label for p in predictions]).cpu().numpy()
    return fake, said, torch.cat([b["label"] for b in batches]).cpu().numpy()


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """auc (of the ROC curve, fake being the positive class), accuracy, f1 (of fake), and the share of either class that is recognised.

    All at the level of videos. Where the videos are of one class only, there is no curve, and auc is NaN. accuracy comes with one
    value a video, for bootstrapping.
    """
    return measured(*joined(predictions, batches))


def measured(fake: np.ndarray, said: np.ndarray, label: np.ndarray) -> tuple[dict[str, float], dict[str, Any]]:
    from sklearn.metrics import f1_score, roc_auc_score

    is_fake = label == FAKE
    right = (said == label).astype(np.float64)
    metrics = {
        "auc": float(roc_auc_score(is_fake, fake)) if 0 < is_fake.sum() < len(label) else float("nan"),
        "accuracy": float(right.mean()),
        "f1": float(f1_score(is_fake, said == FAKE, zero_division=0.0)),
    }
    for c, name in enumerate(NAMES):
        if (label == c).any():
            metrics[f"{name}_recognised"] = float(right[label == c].mean())
    return metrics, {"accuracy": right}


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One dict a video: id, label (fake or real), fake (how fake, 0 to 1), frames (each frame's probability of being fake)."""
    ids = batch.get("id") or [str(i) for i in range(len(prediction.label))]
    fake, frames = prediction.fake.float().cpu().tolist(), prediction.frames.float().cpu().tolist()
    return [
        {"id": name, "label": NAMES[label], "fake": round(f, 6), "frames": [round(v, 4) for v in each]}
        for name, label, f, each in zip(ids, prediction.label.tolist(), fake, frames, strict=True)
    ]


def baseline(data: Data, seed: int = 0, side: int = 16) -> tuple[str, dict[str, float]]:
    """Logistic regression on the raw pixels of frames (16x16), a video's score being its frames' mean, scored on "val"."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from formarium.tasks.deepfake_detection.prepare import resized

    def pixels(split: str) -> tuple[np.ndarray, np.ndarray]:
        samples = [data.splits[split][i] for i in range(len(data.splits[split]))]
        x = np.stack([np.stack([resized(f, (side, side)).ravel() for f in evenly4(s["frames"])]) for s in samples])
        return x / 255.0, np.array([s["label"] for s in samples])

    x, y = pixels("train")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, C=0.01))
    model.fit(x.reshape(-1, x.shape[-1]), np.repeat(y, x.shape[1]))
    x, y = pixels("val")
    share = model.predict_proba(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], 2).mean(1)
    metrics, _ = measured(share[:, FAKE], share.argmax(1), y)
    return "logistic regression on raw pixels", {k: metrics[k] for k in ("auc", "accuracy", "f1")}


def evenly4(frames: np.ndarray) -> np.ndarray:
    """Four frames, spread evenly."""
    return frames[np.linspace(0, len(frames) - 1, 4).astype(int)]
