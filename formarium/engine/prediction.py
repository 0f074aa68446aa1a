"""predict: what a model says of samples that nobody has labelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formarium.engine.evaluation import predicting
from formarium.engine.loader import Batch
from formarium.engine.runs import Run, as_model
from formarium.errors import BadInput, FormariumError
from formarium.model import Model
from formarium.task import Dataset, task

Rows = list[dict[str, Any]]


def predict(
    model: str | Path | Model | Run,
    inputs: Any,
    *,
    batch_size: int = 32,
    precision: str = "auto",
    workers: int = 0,
    seed: int = 0,
    strict: bool = False,
) -> Rows:
    """One dict a sample (for images: id, label, probability, top), in the order of the inputs.

    model: a run directory, a run, a model, or a name. inputs: a path, folder or glob, or several; or an image, or several, as arrays
    (uint8 or uint16 [height, width, channels], float in [0, 1]) or tensors (float [channels, height, width] in [0, 1]); or a Dataset.
    A sample that can't be read gives {"id": its place, "error": what is wrong}; with `strict`, and where none can be read, BadInput.
    """
    found = _Found.of(model, inputs, batch_size, precision, workers, seed)
    if found.errors and (strict or not found.triples):
        raise _unreadable(found.errors)
    rows = {i: row for (rows, _, _), places in zip(found.triples, found.places, strict=True) for i, row in zip(places, rows, strict=True)}
    rows |= {i: {"id": str(i), "error": str(e)} for i, e in found.errors.items()}
    return [rows[i] for i in sorted(rows)]


def predictions(
    model: str | Path | Model | Run, inputs: Any, *, batch_size: int = 32, precision: str = "auto", workers: int = 0, seed: int = 0
) -> list[tuple[Rows, Any, Batch]]:
    """(rows, prediction, batch), batch by batch: what `predict` gives, and what drawing needs. BadInput for a sample that can't be read."""
    found = _Found.of(model, inputs, batch_size, precision, workers, seed)
    if found.errors:
        raise _unreadable(found.errors)
    return found.triples


@dataclass
class _Found:
    triples: list[tuple[Rows, Any, Batch]]
    places: list[list[int]]
    errors: dict[int, FormariumError]

    @staticmethod
    def of(model: Any, inputs: Any, batch_size: int, precision: str, workers: int, seed: int) -> _Found:
        network = as_model(model)
        task_, names, found = task(network.task), getattr(network, "names", ()), _Found([], [], {})
        dataset = as_dataset(inputs, network.task)
        for places, prediction, batch in predicting(
            network, dataset, batch_size=batch_size, precision=precision, workers=workers, seed=seed
        ):
            if isinstance(batch, FormariumError):
                found.errors[places[0]] = batch
                continue
            found.triples.append((task_.rows(prediction, batch, names), prediction, batch))
            found.places.append(places)
        return found


def _unreadable(errors: Mapping[int, FormariumError]) -> BadInput:
    first = [str(e) for e in errors.values()][:3]
    return BadInput(f"{len(errors)} of the inputs", expected="samples that can be read", got="; ".join(first))


# what comes in ------------------------------------------------------------------------------------------------------


def as_dataset(inputs: Any, task_name: str) -> Dataset:
    """Unlabelled samples from paths, values in memory (what the task takes: arrays, tensors, ...), raw samples or a Dataset.

    Raises BadInput for anything else, or nothing.
    """
    task_ = task(task_name)
    if isinstance(inputs, (str, Path)):
        return task_.inputs([inputs])
    if task_.is_single(inputs):
        inputs = [inputs]
    if hasattr(inputs, "__iter__") and not hasattr(inputs, "__getitem__"):
        inputs = [*inputs]
    if not (hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")):
        raise BadInput("inputs", expected="paths, or samples in memory", got=type(inputs).__name__)
    if not len(inputs):
        raise BadInput("inputs", expected="at least one", got="none")
    if type(inputs) not in (list, tuple) and not hasattr(inputs, "dtype"):  # a Dataset
        return inputs
    if all(isinstance(x, (str, Path)) for x in inputs):
        return task_.inputs(inputs)
    return [task_.from_memory(x, i) for i, x in enumerate(inputs)]
