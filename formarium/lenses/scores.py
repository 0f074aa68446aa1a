"""Scores of predictions, probes and class structure, on numpy arrays."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from torch import Tensor

from formarium.nn.components import Components, component_clusters


def macro_f1(label: np.ndarray, predicted: np.ndarray) -> float:
    """The mean over classes (those that occur) of the F1 score."""
    from sklearn.metrics import f1_score

    return float(f1_score(label, predicted, average="macro", zero_division=0))


def per_class_accuracy(label: np.ndarray, predicted: np.ndarray, classes: int | None = None) -> np.ndarray:
    """The share of each class's samples that are right, float64 [classes]; NaN for a class without samples. classes: how many there are,
    by default those that occur among labels and predictions, in order."""
    which = np.union1d(label, predicted) if classes is None else np.arange(classes)
    return np.array([(predicted[label == c] == c).mean() if (label == c).any() else np.nan for c in which])


def scores(label: np.ndarray, predicted: np.ndarray, names: list[str]) -> dict[str, Any]:
    """accuracy, macro_f1, class_accuracy (by name, of the classes that have samples), predicted (how often each class was said)."""
    by_class = per_class_accuracy(label, predicted, len(names))
    counts = np.bincount(predicted, minlength=len(names))
    return {
        "accuracy": rounded((predicted == label).mean()),
        "macro_f1": rounded(macro_f1(label, predicted)),
        "class_accuracy": {name: rounded(a) for name, a in zip(names, by_class, strict=True) if a == a},
        "predicted": {name: int(c) for name, c in zip(names, counts, strict=True)},
    }


def probe(x: np.ndarray, label: np.ndarray, folds: int = 3, seed: int = 0) -> dict[str, float]:
    """A linear probe's held-out macro-F1 and accuracy: logistic regression on standardised features, classes weighted evenly."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=100, tol=1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that stops early ranks layers as well
        predicted = cross_val_predict(classifier, x, label, cv=StratifiedKFold(folds, shuffle=True, random_state=seed))
    return {"macro_f1": rounded(macro_f1(label, predicted)), "accuracy": rounded((predicted == label).mean())}


def structure(x: Tensor, label: np.ndarray) -> dict[str, Any]:
    """The geometry of features [samples, channels].

    How far apart the classes are: separation (silhouette), centroid_accuracy (share of samples nearest to their own class's centroid),
    cluster_purity (of the clusters along the two leading components) and clustered (share of samples in one of them).
    How sparse they are: components_95 (that explain 95% of the variance), first_two (their share of it), participation (ratio).
    """
    from sklearn.metrics import silhouette_score

    components, classes = Components.of(x), len(np.unique(label))
    cells = component_clusters(components.project(2), classes).numpy()
    inside = cells >= 0
    pure = sum(np.bincount(label[cells == c]).max() for c in np.unique(cells[inside]))
    return {
        "separation": rounded(silhouette_score(x.numpy(), label) if classes < len(label) else 0.0),
        "centroid_accuracy": rounded(nearest_centroid(x.double().numpy(), label)),
        "cluster_purity": rounded(pure / max(1, inside.sum())),
        "clustered": rounded(inside.mean()),
        "components_95": components.count(0.95),
        "first_two": rounded(components.explained[:2].sum()),
        "participation": rounded(components.participation),
    }


def nearest_centroid(x: np.ndarray, label: np.ndarray) -> float:
    """The share of samples that lie nearest to the centroid of their own class."""
    classes = np.unique(label)
    centroids = np.stack([x[label == c].mean(0) for c in classes])
    distance = (centroids**2).sum(1) - 2 * x @ centroids.T  # squared, but for the sample's own length
    return float((classes[distance.argmin(1)] == label).mean())


def rounded(value: Any) -> float:
    """A plain float of six digits, as reports hold them."""
    return round(float(value), 6)
