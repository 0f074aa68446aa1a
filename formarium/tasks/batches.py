"""Labelled batches out of whatever samples came: what lenses and methods look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Model
from formarium.task import Data
from formarium.task import task as task_of

Batch = dict[str, Any]


def batches_of(
    model: Model, data: Any, samples: int = 500, batch_size: int = 64, seed: int = 0, split: str = "val", key: str | None = None
) -> list[Batch]:
    """Batches of up to `samples` labelled samples, as the model's task makes them, class indices under "label".

    key: where a sample's class stands in a batch, by default where its task says. Strings become classes in alphabetical order (their names
    under "label_names"), numbers with a fraction become thirds: low, middle, high.

    data: a Data (its `split`), a path or "sample:NAME" (the same), a Dataset or list of raw samples, a loader or list of batches, or one
    batch. Of what has an index a
    random `samples` are taken, by the seed; of a loader the first ones.
    Raises BadInput where there is nothing in it, or no labels.
    """
    if isinstance(data, (str, Path)):
        own, text = task_of(model.task), str(data)
        data = own.sample(text.removeprefix("sample:")) if text.startswith("sample:") else own.read(data)
    if isinstance(data, Data):
        if split not in data.splits:
            raise BadInput(f"data {data.name!r}", expected=f"a split called {split!r}", got=", ".join(data.splits))
        data = data.splits[split]
    if isinstance(data, Mapping):
        data = [data]
    if isinstance(data, bytes) or not (hasattr(data, "__getitem__") or isinstance(data, Iterable)):
        raise BadInput("data", expected="Data, samples, a loader or batches", got=type(data).__name__)
    raw = _indexed(data) and _raw(data[0])
    batches = _from_samples(model, data, samples, batch_size, seed) if raw else _first(data, samples)
    if not batches:
        raise BadInput("data", expected="labelled samples", got="none")
    return _labelled(batches, key or getattr(task_of(model.task), "class_key", "label"))


def _labelled(batches: list[Batch], key: str) -> list[Batch]:
    if key not in batches[0]:
        if key == "label" or "label" not in batches[0]:
            raise BadInput("data", expected=f"samples with labels ({key})", got=f"batches of {', '.join(batches[0])}")
        key = "label"
    values = joined(batches, key)
    names: list[str] = []
    if isinstance(values, Tensor):
        values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
        if values.ndim != 1:
            raise BadInput(f"batch[{key!r}]", expected="one class or number a sample", got=f"{[*values.shape]}")
        if not values.is_floating_point():
            return batches if key == "label" else _with_labels(batches, values.long(), names)
        edges = torch.quantile(values.double(), torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
        return _with_labels(batches, torch.bucketize(values.double(), edges), ["low", "middle", "high"])
    names = sorted({str(v) for v in values})
    place = {name: i for i, name in enumerate(names)}
    return _with_labels(batches, torch.tensor([place[str(v)] for v in values]), names)


def _with_labels(batches: list[Batch], label: Tensor, names: list[str]) -> list[Batch]:
    parts = label.split([size_of(b) for b in batches])
    return [{**b, "label": part, "label_names": names} for b, part in zip(batches, parts, strict=True)]


def _indexed(data: Any) -> bool:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data) > 0


def _raw(sample: Any) -> bool:
    """A sample as a dataset has it, rather than a batch of tensors."""
    return isinstance(sample, Mapping) and not any(isinstance(v, Tensor) and v.ndim for v in sample.values())


def _from_samples(model: Model, dataset: Any, samples: int, batch_size: int, seed: int) -> list[Batch]:
    task = task_of(model.task)
    transform = task.transform(getattr(model, "preprocessing", {}))
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(dataset))[:samples])
    ready = [transform(dataset[int(i)], rng) for i in chosen]
    return [task.collate(ready[i : i + batch_size]) for i in range(0, len(ready), batch_size)]


def _first(batches: Iterable[Mapping[str, Any]], samples: int) -> list[Batch]:
    out, left = [], samples
    for batch in batches:
        if left <= 0:
            break
        if not isinstance(batch, Mapping):
            raise BadInput("a batch", expected="a dict of tensors", got=type(batch).__name__)
        out.append(take(batch, range(min(left, size_of(batch)))))
        left -= size_of(out[-1])
    return out


def size_of(batch: Mapping[str, Any]) -> int:
    """How many samples a batch holds."""
    return next(len(v) for v in batch.values() if isinstance(v, (Tensor, list, tuple)))


def take(batch: Mapping[str, Any], at: Sequence[int] | range) -> Batch:
    """The batch's samples at these places."""
    n, index = size_of(batch), torch.as_tensor([*at], dtype=torch.int64)

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == n:
            return value[index.to(value.device)]
        return [value[i] for i in at] if isinstance(value, (list, tuple)) and len(value) == n else value

    return {k: pick(v) for k, v in batch.items()}


def joined(batches: Sequence[Mapping[str, Any]], key: str) -> Any:
    """One entry of all batches, one after another: a tensor, or a list."""
    values = [b[key] for b in batches]
    return torch.cat([v.cpu() for v in values]) if isinstance(values[0], Tensor) else [x for v in values for x in v]


def on(device: torch.device, batch: Mapping[str, Any]) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
