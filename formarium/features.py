"""What flows inside a model: Tap (a named place), trace (read or edit there), Features (what was read, with its geometry)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from formarium.errors import BadInput


@dataclass(frozen=True)
class Feature:
    """Tokens at one tap: float [batch, tokens, channels], and where they belong.

    grid: (height, width) or (depth, height, width) or (frames, height, width) of the tokens behind the first `prefix` ones
        (class and register tokens), row-major; None where tokens have no grid.
    geometry: anything else a task's drawing needs (points, times, node index), tensors by name.
    """

    tokens: Tensor
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    geometry: Mapping[str, Any] = field(default_factory=dict)

    def map(self) -> Tensor:
        """The grid tokens as a map, float [batch, channels, *grid]."""
        if self.grid is None:
            raise BadInput("feature map", expected="tokens on a grid", got="tokens without one")
        tokens = self.tokens[:, self.prefix :]
        return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *self.grid)

    def pooled(self) -> Tensor:
        """One vector a sample, float [batch, channels]: the first prefix token where there is one, else the mean."""
        return self.tokens[:, 0] if self.prefix else self.tokens.mean(1)


class Tap(nn.Module):
    """An identity, placed where features are born; a lens or method can read or replace them there.

    layout: "tokens" for [batch, tokens, channels], "map" for [batch, channels, *grid], "grid" for [batch, *grid, channels], "ragged" for
    [tokens of all samples, channels], sorted by sample: call it with `index=` (int64 [tokens], each one's sample) and `batch=`; the
    Feature then
    has each sample's tokens first and zeros after them, and a bool `mask` [batch, tokens] in its geometry.
    Call as `x = self.tap(x, grid=(h, w))`; a map or grid layout needs no grid. `batch=` folds leading windows back: give it where x's
    first dimension is batch * something, and the something becomes more tokens. It costs nothing when nobody looks.
    """

    def __init__(self, layout: str = "tokens", prefix: int = 0):
        super().__init__()
        if layout not in ("tokens", "map", "grid", "ragged"):
            raise ValueError(f"layout {layout!r}")
        self.layout, self.prefix = layout, prefix
        self.watch: Callable[[Feature], Feature | None] | None = None

    def forward(self, x: Tensor, grid: tuple[int, ...] | None = None, batch: int | None = None, **geometry: Any) -> Tensor:
        if self.watch is None:
            return x
        if self.layout == "ragged":
            return self._ragged(x, batch, **geometry)
        tokens = x
        if self.layout == "map":
            grid, tokens = tuple(x.shape[2:]), x.flatten(2).transpose(1, 2)
        elif self.layout == "grid":
            grid, tokens = tuple(x.shape[1:-1]), x.flatten(1, -2)
        if batch is not None and batch != tokens.shape[0]:
            tokens = tokens.reshape(batch, -1, tokens.shape[-1])
        edited = self.watch(Feature(tokens, grid, self.prefix, geometry))
        if edited is None:
            return x
        if edited.tokens.shape != tokens.shape:
            raise BadInput("edited features", expected=f"{[*tokens.shape]}", got=f"{[*edited.tokens.shape]}")
        if self.layout == "map":
            return edited.tokens.transpose(1, 2).reshape(x.shape)
        return edited.tokens.reshape(x.shape)

    def _ragged(self, x: Tensor, batch: int | None, index: Tensor, **geometry: Any) -> Tensor:
        assert self.watch is not None
        counts = torch.bincount(index, minlength=batch or 0)
        mask = torch.arange(int(counts.max()), device=x.device) < counts[:, None]  # b n
        tokens = x.new_zeros(*mask.shape, x.shape[-1])
        tokens[mask] = x
        edited = self.watch(Feature(tokens, None, self.prefix, {**geometry, "mask": mask}))
        return x if edited is None else edited.tokens[mask]


class Features(dict[str, Feature]):
    """What a trace read: tap name -> Feature, in the order of the forward pass; and the model's output as `.output`."""

    output: Any = None


def taps(model: nn.Module, at: str | tuple[str, ...] = "*") -> dict[str, Tap]:
    """A model's taps whose names match a glob, e.g. "stages.*.blocks.*". A tap called `...x.tap` goes by `...x`."""
    patterns = (at,) if isinstance(at, str) else tuple(at)
    named = {_public(name): m for name, m in model.named_modules() if isinstance(m, Tap)}
    return {name: tap for name, tap in named.items() if any(fnmatchcase(name, p) for p in patterns)}


def _public(name: str) -> str:
    return name.removesuffix(".tap")


Edit = Callable[[Feature], Tensor]


def trace(model: Any, batch: Any, at: str | tuple[str, ...] = "*", edit: Mapping[str, Edit] | None = None, grad: bool = False) -> Features:
    """Run the model once and read its features.

    batch: what `forward` takes: a tensor, a tuple of tensors, or a task's batch dict (then `model.forward_batch` says how it is fed).
    at: glob or globs over tap names. edit: tap glob -> function of the Feature giving its new tokens (same shape).
    grad: keep the graph (default: no_grad). The model's mode (train/eval) is left as it is.
    Raises BadInput where no tap matches, naming those there are.
    """
    read, found = taps(model, at), Features()
    edits = {name: fn for pattern, fn in (edit or {}).items() for name in _must(model, pattern)}
    if not read:
        _must(model, at)
    with watching(model, {**dict.fromkeys([*read, *edits])}, found, read, edits), torch.set_grad_enabled(grad):
        found.output = _run(model, batch)
    return found


def _must(model: nn.Module, pattern: str | tuple[str, ...]) -> dict[str, Tap]:
    matched = taps(model, pattern)
    if not matched:
        names = [*taps(model)]
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise BadInput(f"taps {pattern!r}", expected=f"a glob over: {shown or 'none (this model has no taps)'}", got="no match")
    return matched


def _run(model: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model.forward_batch(batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


@contextmanager
def watching(
    model: nn.Module, names: Mapping[str, Any], found: Features, read: Mapping[str, Tap], edits: Mapping[str, Edit]
) -> Iterator[None]:
    all_taps = taps(model)
    before = {name: all_taps[name].watch for name in names}

    def watcher(name: str) -> Callable[[Feature], Feature | None]:
        def watch(feature: Feature) -> Feature | None:
            edited = replace(feature, tokens=edits[name](feature)) if name in edits else None
            if name in read:
                found[name] = edited or feature
            return edited

        return watch

    try:
        for name in names:
            all_taps[name].watch = watcher(name)
        yield
    finally:
        for name, old in before.items():
            all_taps[name].watch = old
