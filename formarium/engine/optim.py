"""Optimisers, schedules, clipping, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from formarium.engine.recipes import Recipe
from formarium.errors import BadInput
from formarium.model import Model


def optimiser(model: Model, recipe: Recipe, train: Iterable[str] = ("*",), **over: Any) -> torch.optim.Optimizer:
    """Over the parameters whose names match a glob in `train`; vectors, biases and the model's own list go without weight decay."""
    value = {**recipe.as_dict(), **over}
    spared = model.no_weight_decay()
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad and any(fnmatchcase(name, g) for g in train):
            (free if p.ndim <= 1 or any(fnmatchcase(name, g) for g in spared) else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": value["weight_decay"]}, {"params": free, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    if not groups:
        raise BadInput("train", expected="globs that match parameters", got=", ".join(train))
    match value["optimizer"]:
        case "adamw":
            return torch.optim.AdamW(groups, lr=value["lr"], betas=tuple(value["betas"]), fused=_fused(groups))
        case "adam":
            return torch.optim.Adam(groups, lr=value["lr"], betas=tuple(value["betas"]), fused=_fused(groups))
        case "sgd":
            return torch.optim.SGD(groups, lr=value["lr"], momentum=value["momentum"], nesterov=True)
    raise BadInput("optimizer", expected="adamw, adam or sgd", got=repr(value["optimizer"]))


def _fused(groups: Iterable[Mapping[str, Any]]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])


def learning_rate(recipe: Recipe, step: int, steps: int, per_epoch: int, peak: float | None = None) -> float:
    """Of step 0 .. steps - 1: linear from warmup_lr over the warm-up, then half a cosine down to min_lr."""
    peak = recipe.lr if peak is None else peak
    warmup = min(round(recipe.warmup_epochs * per_epoch), steps // 2)
    if step < warmup:
        return recipe.warmup_lr + (peak - recipe.warmup_lr) * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    floor = min(recipe.min_lr, peak)
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


def clip(parameters: Iterable[nn.Parameter], limit: float, mode: str) -> None:
    """In place. norm: the whole gradient's 2-norm. agc: each output unit's, at a share of its weight's (Brock et al. 2021)."""
    parameters = [p for p in parameters if p.grad is not None]
    if mode == "norm":
        torch.nn.utils.clip_grad_norm_(parameters, limit)
        return
    if mode != "agc":
        raise BadInput("clip_mode", expected="norm or agc", got=repr(mode))
    for p in parameters:
        assert p.grad is not None
        weight, gradient = _unit_norm(p.detach()).clamp_min(1e-3), _unit_norm(p.grad)
        p.grad.mul_((weight * limit / gradient.clamp_min(1e-6)).clamp_max(1.0))


def _unit_norm(x: Tensor) -> Tensor:
    """The norm of each output unit's weights, shaped to broadcast; a vector is one unit."""
    return x.norm() if x.ndim <= 1 else x.norm(dim=tuple(range(1, x.ndim)), keepdim=True)


class Averaged:
    """An exponential moving average of a model's weights and statistics, warmed up so that early steps don't drag the start along."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)
