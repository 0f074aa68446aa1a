"""evaluate: metrics on held-out data, with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formarium.engine.loader import Batch, placed_batches, reseed, to_device
from formarium.engine.precision import autocast, resolve_for
from formarium.engine.runs import Run, as_model, data_for, must_fit
from formarium.errors import BadInput, FormariumError
from formarium.model import Model
from formarium.task import Data, Dataset, task

KEPT = 2**30  # bytes of batches that an evaluation holds on to


@dataclass
class Evaluation:
    """metrics by name; intervals: metric -> (low, high), 95% by percentile bootstrap, for metrics that are means over samples.

    per_sample: metric -> float array [samples]. predictions, batches: what the model said of what, batch by batch, on the CPU; of batches
    beyond the first KEPT bytes only what the task scores by (its `scored` keys, where it names them).
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_sample: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    predictions: list[Any] = field(default_factory=list, repr=False)
    batches: list[Batch] = field(default_factory=list, repr=False)
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
    """Score a model on one split of labelled data, all of it.

    model: a model, a run, a run directory, or a name (fresh weights). data: a Data, a path, or "sample:NAME"; a folder that the run was
    fitted on is split as it was then. precision: "auto" is bfloat16 where the processor has it natively and the run found it harmless.
    bootstrap: resamples (0 for none). seed: of the resamples, and of what a model draws when it predicts.
    The model's mode and torch's random state are left as they were.
    Raises BadInput where the split isn't there, is empty or has a sample that can't be read, or where the classes don't fit.
    """
    network = as_model(model)
    found = data_for(network, data)
    dataset = split_of(found, split)
    must_fit(network, found)
    predictions, batches = predict_all(network, dataset, batch_size=batch_size, precision=precision, workers=workers, seed=seed)
    metrics, per_sample = task(network.task).score(predictions, batches)
    intervals = {k: interval(v, bootstrap, seed) for k, v in per_sample.items()} if bootstrap else {}
    return Evaluation(metrics, intervals, per_sample, predictions, batches, len(dataset))


def split_of(data: Data, split: str) -> Dataset:
    """One split of some data. Raises BadInput where it isn't there, or is empty."""
    if split not in data.splits:
        raise BadInput(f"split {split!r} of {data.name}", expected=" or ".join(data.splits), got="no such split")
    if not len(data.splits[split]):
        raise BadInput(f"split {split!r} of {data.name}", expected="at least one sample", got="none")
    return data.splits[split]


# prediction over a dataset ------------------------------------------------------------------------------------------


def predict_all(
    model: Model, dataset: Dataset, *, batch_size: int = 64, precision: str = "auto", workers: int = 0, seed: int = 0
) -> tuple[list[Any], list[Batch]]:
    """Predictions and batches (see Evaluation) over a whole dataset, on the CPU. Raises BadInput for a sample that can't be read."""
    predictions, batches, kept = [], [], 0
    scored = task(model.task).scored
    for _, prediction, batch in predicting(model, dataset, batch_size=batch_size, precision=precision, workers=workers, seed=seed):
        if isinstance(batch, FormariumError):
            raise batch
        kept += sum(v.numel() * v.element_size() for v in batch.values() if torch.is_tensor(v))
        predictions.append(prediction)
        batches.append(batch if kept <= KEPT or scored is None else {k: v for k, v in batch.items() if k in scored})
    return predictions, batches


def predicting(
    model: Model, dataset: Dataset, *, batch_size: int = 64, precision: str = "auto", workers: int = 0, seed: int = 0
) -> Iterator[tuple[list[int], Any, Batch | FormariumError]]:
    """(indices, prediction, batch) over a dataset; for a sample that can't be read (its index, None, the error that says so).

    Without gradients, in evaluation mode; the model's mode and torch's random state are as they were whenever this yields.
    """
    if batch_size < 1:
        raise BadInput("batch_size", expected="at least 1", got=str(batch_size))
    task_, device = task(model.task), model.device
    how = resolve_for(model, precision)
    for places, batch in placed_batches(dataset, task_.transform(model.preprocessing), task_.collate, batch_size, workers):
        if isinstance(batch, FormariumError):
            yield places, None, batch
            continue
        was = model.training
        model.eval()
        try:
            with torch.no_grad(), autocast(how, device), torch.random.fork_rng([device] if device.type == "cuda" else []):
                reseed(seed + places[0], device)
                prediction = _to_cpu(model.predict(to_device(batch, device)))
        finally:
            model.train(was)
        yield places, prediction, batch


def _to_cpu(prediction: Any) -> Any:
    if torch.is_tensor(prediction):
        return prediction.float().cpu() if prediction.is_floating_point() else prediction.cpu()
    if hasattr(prediction, "_replace"):  # a NamedTuple
        return type(prediction)(*map(_to_cpu, prediction))
    if isinstance(prediction, dict):
        return {k: _to_cpu(v) for k, v in prediction.items()}
    if isinstance(prediction, (list, tuple)):
        return type(prediction)(map(_to_cpu, prediction))
    return prediction


# confidence ---------------------------------------------------------------------------------------------------------


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
