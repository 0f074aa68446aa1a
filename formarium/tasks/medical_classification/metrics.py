"""Scores of class probabilities, predictions as plain rows, and the trivial rival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from formarium.task import Data
from formarium.tasks.medical_classification.model import RANKS


def joined(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(probabilities float64 [samples, classes], labels, ranks)."""
    probabilities = torch.cat([p.probabilities for p in predictions]).double().cpu().numpy()
    label, rank = (torch.cat([b[key].cpu() for b in batches]).numpy() for key in ("label", "rank"))
    return probabilities, label, rank


def auc(probabilities: np.ndarray, label: np.ndarray) -> float:
    """The area under the ROC curve: of class 1 where there are two classes, else the mean of one against the rest over the classes that
    occur (and don't make up everything). 0.5 where no class does."""
    from sklearn.metrics import roc_auc_score

    classes = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    areas = [float(roc_auc_score(label == k, probabilities[:, k])) for k in classes if 0 < (label == k).sum() < len(label)]
    return float(np.mean(areas)) if areas else 0.5


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """auc; accuracy; f1, precision and recall (of class 1 where there are two classes, else means over classes); Cohen's kappa, and with
    quadratic weights (for grades). Where both ranks occur, auc and accuracy of each too. accuracy has one value a sample."""
    probabilities, label, rank = joined(predictions, batches)
    metrics = {"auc": auc(probabilities, label), **_decisions(probabilities.argmax(1), label, probabilities.shape[1])}
    if len({*rank.tolist()}) > 1:
        for r in RANKS:
            mine = rank == r
            metrics[f"auc_{r}d"] = auc(probabilities[mine], label[mine])
            metrics[f"accuracy_{r}d"] = float((probabilities[mine].argmax(1) == label[mine]).mean())
    return metrics, {"accuracy": (probabilities.argmax(1) == label).astype(np.float64)}


def _decisions(said: np.ndarray, label: np.ndarray, classes: int) -> dict[str, float]:
    from sklearn.metrics import cohen_kappa_score, precision_recall_fscore_support

    how: dict[str, Any] = {"average": "binary", "pos_label": 1} if classes == 2 else {"average": "macro"}
    precision, recall, f1, _ = precision_recall_fscore_support(label, said, zero_division=0, **how)
    same = len({*label.tolist(), *said.tolist()}) < 2  # one class alone: agreement by chance is total, kappa undefined
    kappas = [0.0 if same else float(cohen_kappa_score(label, said, weights=w)) for w in (None, "quadratic")]
    found = {"accuracy": (said == label).mean(), "f1": f1, "precision": precision, "recall": recall}
    return {**{k: float(v) for k, v in found.items()}, "kappa": kappas[0], "quadratic_kappa": kappas[1]}


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str], top: int = 3) -> list[dict[str, Any]]:
    """One dict a sample: id, label (its name), probability, the `top` likeliest classes, and its rank."""
    names = names or [str(i) for i in range(prediction.probabilities.shape[1])]
    best = prediction.probabilities.float().cpu().topk(min(top, len(names)))
    ids = batch.get("id") or [str(i) for i in range(len(best.values))]
    out = []
    for i, (name, values, indices) in enumerate(zip(ids, best.values.tolist(), best.indices.tolist(), strict=True)):
        ranked = [{"label": names[k], "probability": round(p, 6)} for p, k in zip(values, indices, strict=True)]
        out.append({"id": name, **ranked[0], "top": ranked, **({"rank": int(batch["rank"][i])} if "rank" in batch else {})})
    return out


def baseline(data: Data, seed: int = 0, most: int = 2000) -> tuple[str, dict[str, float]]:
    """Logistic regression on small grey images (16x16) and volumes (8x8x8), one for each rank, scored on "val"."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from formarium.tasks.medical_classification.prepare import Prepare

    ready = {2: Prepare({"size": 16, "crop": 1.0}), 3: Prepare({"size": 8, "depth": 8, "crop": 1.0})}
    rng, classes = np.random.default_rng(seed), int(data.model_args["num_classes"])

    def values(split: str) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        dataset: Any = data.splits[split]
        out = {}
        for rank, prepare in ready.items():
            at = np.array([i for i, r in enumerate(dataset.ranks) if r == rank], dtype=int)
            at = np.sort(rng.permutation(at)[:most]) if split == "train" else at
            samples = [prepare(dataset[int(i)], rng) for i in at]
            if samples:
                out[rank] = (np.stack([s["image"].mean(0).ravel() for s in samples]), np.array([s["label"] for s in samples]), at)
        return out

    train, held = values("train"), values("val")
    count = len(data.splits["val"])
    probabilities, label = np.full((count, classes), 1 / classes), np.zeros(count, dtype=int)
    for rank, (x, truth, at) in held.items():
        label[at] = truth
        if rank in train and len({*train[rank][1].tolist()}) > 1:
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, C=0.01)).fit(train[rank][0], train[rank][1])
            probabilities[at] = 0
            probabilities[np.ix_(at, model.classes_)] = model.predict_proba(x)
    found = {"auc": auc(probabilities, label), **_decisions(probabilities.argmax(1), label, classes)}
    return "logistic regression on pixels and voxels", found
