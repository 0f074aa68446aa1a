"""Scores of the rows that were asked for, predictions as plain rows and csv, and the rivals."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formarium.errors import BadInput, UnknownName
from formarium.task import Data, file_stem
from formarium.tasks.tabular_classification.model import UNKNOWN

MAJORITY = "the context's most frequent class"
RIVALS = (MAJORITY, "logistic regression", "gradient boosting")


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """accuracy and log_loss (nats) over all rows that were asked for and have a label, one value a row; roc_auc (one class against
    another, mean over pairs) averaged over the tables that have every class among these rows."""
    right, nats, areas = [], [], []
    for prediction, batch in zip(predictions, batches, strict=True):
        for probabilities, label in asked(prediction, batch):
            known = label != UNKNOWN
            p, y = probabilities[known], label[known]
            if not len(y):
                continue
            right.append(p.argmax(1) == y)
            nats.append(-np.log(np.clip(p[np.arange(len(y)), y], 1e-12, 1)))
            areas.append(roc_auc(p, y))
    if not right:
        raise BadInput("rows", expected="labelled rows to score", got="none")
    per_sample = {"accuracy": np.concatenate(right).astype(np.float64), "log_loss": np.concatenate(nats)}
    metrics = {k: float(v.mean()) for k, v in per_sample.items()}
    found = [a for a in areas if a is not None]
    return {**metrics, "roc_auc": float(np.mean(found)) if found else float("nan")}, per_sample


def asked(prediction: Any, batch: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each table of a batch, (probabilities [queries, its classes], label [queries])."""
    out = []
    sizes = zip(batch["context"].tolist(), batch["rows"].tolist(), batch["classes"].tolist(), strict=True)
    for i, (context, rows, classes) in enumerate(sizes):
        p = prediction.probabilities[i, context:rows, :classes].float().cpu().numpy()
        out.append((p, batch["label"][i, context:rows].cpu().numpy()))
    return out


def roc_auc(probabilities: np.ndarray, label: np.ndarray) -> float | None:
    """Area under the ROC curve, mean over pairs of classes; None where a class has no row."""
    from sklearn.metrics import roc_auc_score

    if len(np.unique(label)) < probabilities.shape[1]:
        return None
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(label, probabilities[:, 1]))
    p = probabilities.astype(np.float64)
    return float(roc_auc_score(label, p / p.sum(1, keepdims=True), multi_class="ovo"))


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a table: id, and for each row that was asked for its number, label and probabilities by class."""
    out = []
    for i, (p, _) in enumerate(asked(prediction, batch)):
        own = batch.get("class_names", [names] * len(batch["context"]))[i]
        number = batch["row"][i] if "row" in batch else range(len(p))
        said = [
            {"row": int(r), "label": own[int(q.argmax())], "probability": round(float(q.max()), 6), "probabilities": _by_name(own, q)}
            for r, q in zip(number, p, strict=True)
        ]
        out.append({"id": batch["id"][i] if "id" in batch else str(i), "rows": said})
    return out


def _by_name(names: Sequence[str], p: np.ndarray) -> dict[str, float]:
    return {name: round(float(v), 6) for name, v in zip(names, p, strict=True)}


def write(prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """A csv a table: row, label, probability, and one column a class."""
    paths = []
    for table in rows(prediction, batch, names):
        paths.append(folder / f"{file_stem(table['id'])}-predicted.csv")
        with open(paths[-1], "w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f)
            classes = [*table["rows"][0]["probabilities"]] if table["rows"] else []
            writer.writerow(["row", "label", "probability", *(f"p({c})" for c in classes)])
            for r in table["rows"]:
                writer.writerow([r["row"], r["label"], r["probability"], *r["probabilities"].values()])
    return paths


# rivals -------------------------------------------------------------------------------------------------------------


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """The most frequent class of each table's context, scored on "val"."""
    return MAJORITY, rival(data, MAJORITY, seed)


def rival(data: Data, name: str, seed: int = 0) -> dict[str, float]:
    """accuracy, log_loss and roc_auc of one of RIVALS, fitted to each table's context and scored on its other rows."""
    import torch

    from formarium.tasks.tabular_classification.data import collate
    from formarium.tasks.tabular_classification.model import TableLabels

    predictions, batches = [], []
    for i in range(len(data.splits["val"])):
        batch = collate([data.splits["val"][i]])
        context, count = int(batch["context"][0]), int(batch["classes"][0])
        x, y = batch["x"][0].numpy(), batch["label"][0].numpy()
        probabilities = torch.zeros(1, len(x), count)
        if (y[:context] == UNKNOWN).any():
            continue
        probabilities[0, context:] = torch.from_numpy(_fitted(name, x[:context], y[:context], x[context:], count, seed))
        predictions.append(TableLabels(probabilities, probabilities.argmax(-1)))
        batches.append(batch)
    return score(predictions, batches)[0]


def _fitted(name: str, x: np.ndarray, y: np.ndarray, query: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """Probabilities [queries, classes] of a rival fitted to x, y."""
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    made = {
        MAJORITY: lambda: DummyClassifier(strategy="prior"),
        "logistic regression": lambda: make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression(max_iter=1000)),
        "gradient boosting": lambda: HistGradientBoostingClassifier(random_state=seed, min_samples_leaf=5),
    }
    if name not in made:
        raise UnknownName("rival", name, made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = made[name]().fit(x, y)
    out = np.zeros((len(query), classes), dtype=np.float32)
    out[:, model.classes_] = model.predict_proba(query)
    return out
