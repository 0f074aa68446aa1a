"""Batches in an order that the seed alone decides: the same on every run, with any number of workers, after any interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from formarium.errors import BadInput
from formarium.task import Dataset, Sample, Transform

Key = tuple[int, int]  # epoch, index


@dataclass
class Prepared:
    """Samples by (epoch, index), transformed with a random stream of their own."""

    dataset: Dataset
    transform: Transform
    seed: int

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        return self.transform(self.dataset[index], np.random.default_rng((self.seed, epoch, index)))

    def __len__(self) -> int:
        return len(self.dataset)


@lru_cache(maxsize=2)
def _shuffled(samples: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


@dataclass(frozen=True)
class Order:
    """Which samples make which batch. A last batch that would be short is left to the next epoch's shuffle."""

    samples: int
    batch_size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        return max(1, self.samples // self.batch_size)

    def batch(self, step: int) -> list[Key]:
        epoch, at = divmod(step, self.per_epoch)
        size = min(self.batch_size, self.samples)
        return [(epoch, i) for i in _shuffled(self.samples, self.seed, epoch)[at * size : (at + 1) * size].tolist()]

    def batches(self, first: int, last: int) -> Iterator[list[Key]]:
        for step in range(first, last):
            yield self.batch(step)


def training_batches(
    prepared: Prepared, order: Order, first: int, last: int, collate: Callable[[Sequence[Sample]], Any], workers: int = 0
) -> Iterator[dict[str, Any]]:
    """The batches of steps first .. last - 1."""
    keys = _Steps(order, first, last)
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": False, "prefetch_factor": 4} if workers else {}
    yield from DataLoader(prepared, batch_sampler=keys, collate_fn=collate, **options)  # type: ignore[arg-type]


@dataclass
class _Steps:
    order: Order
    first: int
    last: int

    def __iter__(self) -> Iterator[list[Key]]:
        return self.order.batches(self.first, self.last)

    def __len__(self) -> int:
        return self.last - self.first


def share(batch: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """One process's part of a global batch, every world-th sample."""
    if world == 1:
        return batch
    size = len(next(v for v in batch.values() if hasattr(v, "__len__")))
    if size % world:
        raise BadInput("batch size", expected=f"a multiple of {world} processes", got=str(size), fix="set batch_size")
    return {k: v[rank::world] for k, v in batch.items()}


def parts(batch: dict[str, Any], count: int) -> list[tuple[dict[str, Any], float]]:
    """A batch in `count` parts with the weight each has in the mean."""
    if count == 1:
        return [(batch, 1.0)]
    size = len(next(iter(batch.values())))
    cuts = [round(i * size / count) for i in range(count + 1)]
    return [({k: v[a:b] for k, v in batch.items()}, (b - a) / size) for a, b in pairwise(cuts) if b > a]


def evaluation_batches(
    dataset: Dataset, transform: Transform, collate: Callable[[Sequence[Sample]], Any], batch_size: int, workers: int = 0
) -> Iterator[dict[str, Any]]:
    """All samples in order, the last batch as short as it is."""
    prepared = Prepared(dataset, transform, 0)
    keys = [[(0, i) for i in range(a, min(a + batch_size, len(dataset)))] for a in range(0, len(dataset), batch_size)]
    yield from DataLoader(prepared, batch_sampler=keys, collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
