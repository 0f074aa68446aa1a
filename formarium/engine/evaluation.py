"""evaluate: metrics on held-out data, with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formarium.engine.loader import evaluation_batches, to_device
from formarium.engine.precision import autocast, resolve
from formarium.engine.runs import Run, as_data, as_model
from formarium.errors import BadInput
from formarium.model import Model
from formarium.task import Data, Dataset, task


@dataclass
class Evaluation:
    """metrics by name; intervals: metric -> (low, high), 95% by percentile bootstrap, for metrics that are means over samples."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_sample: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    predictions: list[Any] = field(default_factory=list, repr=False)
    batches: list[dict[str, Any]] = field(default_factory=list, repr=False)
    samples: int = 0


def evaluate(
    model: str | Path | Model | Run,
    data: str | Path | Data,
    split: str = "val",
    *,
    batch_size: int = 64,
    precision: str = "auto",
    bootstrap: int = 1000,
    seed: int = 0,
    workers: int = 0,
) -> Evaluation:
    """Score a model on one split of labelled data.

    model: a model, a run, a run directory, or a name (fresh weights). data: a Data, a path, or "sample:NAME".
    precision: "auto" is what the run found harmless, else bfloat16 where the processor has it natively. bootstrap: resamples (0 for none).
    Raises BadInput where the split isn't there or the classes don't fit.
    """
    model = as_model(model)
    found = as_data(data, model.task, seed=seed)
    if split not in found.splits:
        raise BadInput(f"split {split!r}", expected=" or ".join(found.splits), got="no such split")
    _must_fit(model, found)
    task_ = task(model.task)
    predictions, batches = predict_all(model, found.splits[split], batch_size=batch_size, precision=precision, workers=workers)
    metrics, per_sample = task_.score(predictions, batches)
    intervals = {k: interval(v, bootstrap, seed) for k, v in per_sample.items()} if bootstrap else {}
    return Evaluation(metrics, intervals, per_sample, predictions, batches, len(found.splits[split]))


def _must_fit(model: Model, data: Data) -> None:
    for key, value in data.model_args.items():
        own = getattr(model.config, key, value)
        if own != value:
            raise BadInput(f"{model.variant} on {data.name}", expected=f"{key} = {value}, as the data has", got=f"a model with {own}")


def predict_all(
    model: Model, dataset: Dataset, *, batch_size: int = 64, precision: str = "auto", workers: int = 0
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Predictions and batches over a whole dataset, on the CPU, in evaluation mode; the model's mode is left as it was."""
    task_, device, was = task(model.task), model.device, model.training
    how = resolve(precision_of(model, precision), device.type)
    predictions, batches = [], []
    model.eval()
    try:
        with torch.inference_mode(), autocast(how, device):
            for batch in evaluation_batches(dataset, task_.transform(model.preprocessing), task_.collate, batch_size, workers):
                predictions.append(_to_cpu(model.predict(to_device(batch, device))))
                batches.append(batch)
    finally:
        model.train(was)
    return predictions, batches


def precision_of(model: Model, asked: str) -> str:
    """ "auto" under what the model's own run found harmless."""
    return model.precision if asked == "auto" and model.precision else asked


def _to_cpu(prediction: Any) -> Any:
    if hasattr(prediction, "_replace"):
        return type(prediction)(*(x.float().cpu() if torch.is_tensor(x) and x.is_floating_point() else x.cpu() for x in prediction))
    return prediction


def interval(values: Sequence[float] | np.ndarray, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean over samples."""
    means = resampled_means(np.asarray(values, dtype=np.float64)[None], resamples, seed)[0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of bootstrap resamples, [rows, resamples], of values [rows, samples]; all rows are resampled alike, for paired comparison."""
    rng, n = np.random.default_rng(seed), values.shape[1]
    out = np.empty((len(values), resamples))
    for start in range(0, resamples, 100):  # in slices, so that a large test set fits the memory
        stop = min(start + 100, resamples)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=stop - start)
        out[:, start:stop] = values @ counts.T / n
    return out
