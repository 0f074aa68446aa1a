"""Batches in an order that the seed alone decides: the same on every run, with any number of workers and processes, after any kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from formarium.errors import BadInput, FormariumError
from formarium.task import BatchTransform, Dataset, Sample, Transform

Batch = dict[str, Any]
Collate = Callable[[Sequence[Sample]], Batch]
Key = tuple[int, int, int]  # epoch, index, copy

ORDER, AUGMENT, MIX, NOISE = range(4)  # what randomness is for; each has streams of its own


def stream(seed: int, purpose: int, *place: int) -> int:
    """A seed for one purpose at one place (an epoch, a step, a sample): unrelated to its neighbours', the same on every machine."""
    return int(np.random.SeedSequence((seed, purpose, *place)).generate_state(1, np.uint64)[0])


def reseed(seed: int, device: torch.device) -> None:
    """Decide what torch draws on the CPU and on a device from now on, at less cost than torch.manual_seed, which tells every backend."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


# training -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """Which samples make which batch. A last batch that would be short is left to the next epoch's shuffle.

    copies: every sample stands so often in a row (repeated augmentation), and the epoch ends after as many samples as there are.
    """

    samples: int
    batch_size: int
    seed: int
    copies: int = 1

    @property
    def size(self) -> int:
        return min(self.batch_size, self.samples)

    @property
    def per_epoch(self) -> int:
        return max(1, self.samples // self.batch_size)

    def batch(self, step: int) -> list[Key]:
        epoch, at = divmod(step, self.per_epoch)
        shuffled = _shuffled(self.samples, self.seed, epoch)
        return [(epoch, shuffled[i // self.copies], i % self.copies) for i in range(at * self.size, (at + 1) * self.size)]


@lru_cache(maxsize=2)
def _shuffled(samples: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng(stream(seed, ORDER, epoch)).permutation(samples).tolist()


@dataclass
class Prepared:
    """Samples by key, transformed, each with a random stream of its own. One that can't be read comes as the error that says so."""

    dataset: Dataset
    transform: Transform
    seed: int = 0

    def __getitem__(self, key: Key) -> Sample | FormariumError:
        index = key[1]
        try:
            sample = self.dataset[index]
        except FormariumError as e:
            return e
        except (OSError, ValueError, SyntaxError) as e:  # what decoders raise
            return BadInput(f"sample {index}", expected="one that can be read", got=f"{type(e).__name__}: {e}")
        try:
            transform = self.transform.at(key[0]) if hasattr(self.transform, "at") else self.transform
            return transform(sample, np.random.default_rng(stream(self.seed, AUGMENT, *key)))
        except FormariumError as e:
            return e

    def __len__(self) -> int:
        return len(self.dataset)


@dataclass
class _Joined:
    """Collates in the worker; an error travels as a value, since a worker's exceptions lose their class on the way."""

    collate: Collate

    def __call__(self, samples: Sequence[Sample | FormariumError]) -> Batch | FormariumError:
        for sample in samples:
            if isinstance(sample, FormariumError):
                return sample
        return self.collate(samples)  # type: ignore[arg-type]


def training_batches(
    prepared: Prepared,
    order: Order,
    steps: range,
    collate: Collate,
    mix: BatchTransform | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """One process's part of the batches of some steps: every world-th sample.

    What mixes samples sees the whole batch, so that it does the same whatever the number of processes.
    Raises BadInput for a sample that can't be read.
    """
    split = slice(None) if mix is not None else slice(rank, None, world)
    sampler = _Steps(order, steps, split)
    options: dict[str, Any] = {"num_workers": workers, "prefetch_factor": 4} if workers else {}
    options["generator"] = torch.Generator()  # or it would draw from everybody's
    loader: Any = DataLoader(prepared, batch_sampler=sampler, collate_fn=_Joined(collate), pin_memory=torch.cuda.is_available(), **options)  # type: ignore[arg-type]
    for step, batch in zip(steps, loader, strict=True):
        if isinstance(batch, FormariumError):
            raise batch
        if mix is not None:
            batch = mix(batch, torch.Generator().manual_seed(stream(order.seed, MIX, step)))
            batch = part(batch, slice(rank, None, world))
        yield batch


@dataclass
class _Steps:
    order: Order
    steps: range
    split: slice

    def __iter__(self) -> Iterator[list[Key]]:
        return (self.order.batch(step)[self.split] for step in self.steps)

    def __len__(self) -> int:
        return len(self.steps)


# batches ------------------------------------------------------------------------------------------------------------


def size_of(batch: Mapping[str, Any]) -> int:
    """How many samples a batch holds."""
    return len(batch["id"]) if "id" in batch else len(next(v for v in batch.values() if hasattr(v, "__len__")))


def part(batch: Batch, which: slice) -> Batch:
    """Some of a batch's samples; what isn't one entry a sample stays whole."""
    size = size_of(batch)
    return {k: v[which] if _per_sample(v, size) else v for k, v in batch.items()}


def _per_sample(value: Any, size: int) -> bool:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.ndim > 0 and len(value) == size
    return isinstance(value, (list, tuple)) and len(value) == size


def parts(batch: Batch, count: int) -> list[tuple[Batch, float]]:
    """A batch in `count` parts with the weight each has in the mean."""
    if count == 1:
        return [(batch, 1.0)]
    size = size_of(batch)
    cuts = [round(i * size / count) for i in range(count + 1)]
    return [(part(batch, slice(a, b)), (b - a) / size) for a, b in pairwise(cuts) if b > a]


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


# evaluation ---------------------------------------------------------------------------------------------------------

Placed = tuple[list[int], Batch | FormariumError]  # indices of the samples, and their batch


def placed_batches(dataset: Dataset, transform: Transform, collate: Collate, batch_size: int, workers: int = 0) -> Iterator[Placed]:
    """All samples once, in order, the last batch as short as it is. Samples that can't be stacked come in batches of one shape each,
    one that can't be read as the error that says so."""
    prepared = Prepared(dataset, transform)
    keys = [[(0, i, 0) for i in range(a, min(a + batch_size, len(dataset)))] for a in range(0, len(dataset), batch_size)]
    loader: Any = DataLoader(prepared, batch_sampler=keys, collate_fn=_Grouped(collate), num_workers=workers, generator=torch.Generator())  # type: ignore[arg-type]
    first = 0
    for placed in loader:
        for places, batch in placed:
            yield [first + i for i in places], batch
        first += batch_size


def evaluation_batches(dataset: Dataset, transform: Transform, collate: Collate, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """`placed_batches` without the places. Raises BadInput for a sample that can't be read."""
    for _, batch in placed_batches(dataset, transform, collate, batch_size, workers):
        if isinstance(batch, FormariumError):
            raise batch
        yield batch


@dataclass
class _Grouped:
    collate: Collate

    def __call__(self, samples: Sequence[Sample | FormariumError]) -> list[Placed]:
        bad: list[Placed] = [([i], s) for i, s in enumerate(samples) if isinstance(s, FormariumError)]
        good = {i: s for i, s in enumerate(samples) if not isinstance(s, FormariumError)}
        if not good:
            return bad
        try:
            return [([*good], self.collate([*good.values()])), *bad]
        except (ValueError, RuntimeError):
            groups: dict[Any, list[int]] = {}
            for i, sample in good.items():
                groups.setdefault(_shapes(sample), []).append(i)
            if len(groups) == 1:
                raise
            return [*((places, self.collate([good[i] for i in places])) for places in groups.values()), *bad]


def _shapes(sample: Sample) -> tuple[Any, ...]:
    return tuple((k, tuple(v.shape)) for k, v in sample.items() if hasattr(v, "shape"))
