"""Scores of predictions on graphs and their nodes, predictions as plain rows, and the trivial rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from formarium.task import Data, Sample


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """For values: score = 1 - MAE / (mean absolute deviation from the median), mae, rmse, r2. For classes: score = balanced_accuracy (the
    mean over classes of the share found, as the SBM benchmarks have it), accuracy, macro_f1. Shares, from 0 to 1 (score may be negative).

    score, mae and balanced_accuracy come with one number a graph, whose mean they are.
    """
    if hasattr(predictions[0], "value"):
        return value_scores([*zip(*(_values(p, b) for p, b in zip(predictions, batches, strict=True)), strict=True)])
    return label_scores([pair for p, b in zip(predictions, batches, strict=True) for pair in _labels(p, b)])


def _values(prediction: Any, batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(value, target) as [graphs, anything], NaN where there is none."""
    target = batch["target"].float().cpu().flatten(1).numpy()
    return prediction.value.float().cpu().flatten(1).numpy(), target


def value_scores(pairs: Sequence[Sequence[np.ndarray]]) -> tuple[dict[str, float], dict[str, Any]]:
    from sklearn.metrics import r2_score

    value, target = ([row for block in side for row in block] for side in pairs)
    known = [~np.isnan(t) for t in target]
    truth = np.concatenate([t[k] for t, k in zip(target, known, strict=True)]).astype(np.float64)
    said = np.concatenate([v[k] for v, k in zip(value, known, strict=True)]).astype(np.float64)
    spread = float(np.abs(truth - np.median(truth)).mean()) or 1.0
    errors = np.array([np.abs(v[k] - t[k]).sum() for v, t, k in zip(value, target, known, strict=True)]) * len(value) / len(truth)
    metrics = {"mae": float(errors.mean()), "rmse": float(np.sqrt(((said - truth) ** 2).mean()))}
    metrics["r2"] = float(r2_score(truth, said)) if len(truth) > 1 else float("nan")
    return {"score": 1 - metrics["mae"] / spread, **metrics}, {"score": 1 - errors / spread, "mae": errors}


def _labels(prediction: Any, batch: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(said, true) of each graph, as far as the truth is known."""
    said, true = (x.cpu().reshape(len(x), -1).numpy() for x in (prediction.label, batch["label"]))
    return [(s[t >= 0], t[t >= 0]) for s, t in zip(said, true, strict=True)]


def label_scores(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[dict[str, float], dict[str, Any]]:
    from sklearn.metrics import f1_score

    said, true = (np.concatenate(side) for side in zip(*pairs, strict=True))
    present, sizes = np.unique(true, return_counts=True)
    share = np.zeros(int(true.max()) + 1)
    share[present] = 1 / (len(present) * sizes)
    balanced = np.array([((s == t) * share[t]).sum() for s, t in pairs]) * len(pairs)
    metrics = {
        "score": float(balanced.mean()),
        "balanced_accuracy": float(balanced.mean()),
        "accuracy": float((said == true).mean()),
        "macro_f1": float(f1_score(true, said, average="macro", zero_division=0.0)),
    }
    return metrics, {"score": balanced, "balanced_accuracy": balanced}


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a graph: id, and its values by name, its label and probability, or the labels and probabilities of its nodes."""
    nodes = batch["nodes"].cpu()
    ids = batch.get("id") or [str(i) for i in range(len(nodes))]
    out = []
    for i, name in enumerate(ids):
        present = nodes[i] >= 0
        if hasattr(prediction, "value"):
            value = prediction.value[i].float().cpu()
            per_node = value.ndim == 2
            called = names if len(names) == value.shape[-1] else [f"value {j}" for j in range(value.shape[-1])]
            shown = value[present].T.tolist() if per_node else value.tolist()
            out.append({"id": name, **dict(zip(called, shown, strict=True))})
            continue
        probabilities, label = prediction.probabilities[i].float().cpu(), prediction.label[i].cpu()
        called = names if len(names) == probabilities.shape[-1] else [str(j) for j in range(probabilities.shape[-1])]
        if label.ndim:
            best = probabilities[present].amax(-1)
            found = {"labels": [called[j] for j in label[present].tolist()], "probabilities": [round(p, 6) for p in best.tolist()]}
        else:
            found = {"label": called[int(label)], "probability": round(float(probabilities.max()), 6)}
        out.append({"id": name, **found})
    return out


# rivals -------------------------------------------------------------------------------------------------------------


def counts(sample: Sample, args: Mapping[str, Any]) -> np.ndarray:
    """What a graph is made of: its size, how many nodes and edges of each type, how many nodes of each degree (to 6)."""
    degree = np.bincount(sample["edges"][:, 1], minlength=len(sample["nodes"])).clip(max=6)
    kinds = (sample["nodes"], args["num_node_types"]), (sample["edge_types"], args["num_edge_types"]), (degree, 7)
    return np.concatenate([[len(sample["nodes"])], *(np.bincount(x, minlength=size) for x, size in kinds)]).astype(np.float64)


def node_features(sample: Sample, args: Mapping[str, Any]) -> np.ndarray:
    """Of each node: its type (one-hot), its degree, and the mean degree of its graph."""
    degree = np.bincount(sample["edges"][:, 1], minlength=len(sample["nodes"])).astype(np.float64)
    return np.column_stack([np.eye(args["num_node_types"])[sample["nodes"]], degree, np.full_like(degree, degree.mean())])


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """The better of two rivals on "val": for values, the median and ridge regression; for classes, the majority and logistic regression;
    on counts (graphs) or type and degree (nodes)."""
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multioutput import MultiOutputRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    args, key = data.model_args, "target" if data.model_args["regression"] else "label"
    splits = {k: [data.splits[k][i] for i in range(len(data.splits[k]))] for k in ("train", "val")}
    of_nodes = args["level"] == "node"
    x = {
        k: np.concatenate([node_features(s, args) for s in v]) if of_nodes else np.stack([counts(s, args) for s in v])
        for k, v in splits.items()
    }
    y = {k: np.concatenate([s[key] for s in v]) if of_nodes else np.stack([s[key] for s in v]) for k, v in splits.items()}
    cuts = np.cumsum([len(s["nodes"]) if of_nodes else 1 for s in splits["val"]])[:-1]
    known = ~np.isnan(y["train"]).any(-1) if args["regression"] else y["train"] >= 0
    on = "type and degree" if of_nodes else "counts of types and degrees"
    if args["regression"]:
        rivals = {
            "median": DummyRegressor(strategy="median"),
            f"ridge regression on {on}": MultiOutputRegressor(make_pipeline(StandardScaler(), Ridge())),
        }
    else:
        logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, class_weight="balanced"))
        rivals = {"majority": DummyClassifier(), f"logistic regression on {on}": logistic}
    found = {}
    for name, rival in rivals.items():
        said = rival.fit(x["train"][known], y["train"][known]).predict(x["val"])
        if args["regression"]:
            pieces = [np.split(a.reshape(len(a), -1), cuts) for a in (said, y["val"])]
            found[name] = value_scores([[[p.ravel() for p in side]] for side in pieces])[0]
        else:
            pairs = zip(np.split(said, cuts), np.split(y["val"], cuts), strict=True)
            found[name] = label_scores([(s[t >= 0], t[t >= 0]) for s, t in pairs])[0]
    best = max(found, key=lambda name: found[name]["score"])
    return best, found[best]
