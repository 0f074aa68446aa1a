"""predict: what a model says of files that nobody has labelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formarium.engine.evaluation import predict_all
from formarium.engine.runs import Run, as_model
from formarium.model import Model
from formarium.task import task


def predict(
    model: str | Path | Model | Run,
    inputs: str | Path | Sequence[str | Path],
    *,
    batch_size: int = 32,
    precision: str = "auto",
    workers: int = 0,
) -> list[dict[str, Any]]:
    """One dict a sample (for images: id, label, probability, top), in the order of the files.

    model: a run directory, a run, a model, or a name. inputs: files, folders or globs. Raises BadInput for paths that aren't there
    or can't be decoded.
    """
    return [row for rows, _, _ in predictions(model, inputs, batch_size=batch_size, precision=precision, workers=workers) for row in rows]


def predictions(
    model: str | Path | Model | Run, inputs: Any, *, batch_size: int = 32, precision: str = "auto", workers: int = 0
) -> list[tuple[list[dict[str, Any]], Any, dict[str, Any]]]:
    """(rows, prediction, batch), batch by batch: what `predict` gives, and what drawing needs."""
    model = as_model(model)
    task_ = task(model.task)
    dataset = task_.inputs([inputs] if isinstance(inputs, (str, Path)) else [*inputs])
    found, batches = predict_all(model, dataset, batch_size=batch_size, precision=precision, workers=workers)
    names = model.names
    return [(task_.rows(p, b, names), p, b) for p, b in zip(found, batches, strict=True)]
