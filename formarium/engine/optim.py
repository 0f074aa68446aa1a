"""Optimisers, clipping, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from formarium.engine.recipes import OPTIMIZERS, Recipe
from formarium.errors import BadInput, UnknownName
from formarium.features import taps
from formarium.model import Model


def optimiser(model: Model, recipe: Recipe, train: Iterable[str] = ("*",)) -> torch.optim.Optimizer:
    """Over the parameters whose names match a glob in `train`; vectors, biases and the model's own list go without weight decay.

    Parameters that the model has frozen stay out. Raises BadInput where nothing is left.
    """
    groups = _groups(model, recipe, train)
    if not groups:
        raise BadInput("train", expected="globs that match parameters", got=", ".join(train))
    match recipe.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    raise UnknownName("optimizer", recipe.optimizer, OPTIMIZERS)


def _groups(model: Model, recipe: Recipe, train: Iterable[str]) -> list[dict[str, Any]]:
    """Parameters by whether they decay and by their share of the learning rate ("scale")."""
    spared, patterns = model.no_weight_decay(), (*train,)
    depth, layer = layers(model) if recipe.layer_decay != 1 else (0, {})
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad and _matches(name, patterns):
            bare = p.ndim <= 1 or name.endswith("bias") or _matches(name, spared)
            scale = recipe.layer_decay ** (depth + 1 - layer[name]) if layer else 1.0
            scale *= math.prod(share for glob, share in recipe.lr_shares.items() if fnmatchcase(name, glob))
            found.setdefault((0.0 if bare else recipe.weight_decay, scale), []).append(p)
    return [{"params": p, "weight_decay": decay, "scale": scale} for (decay, scale), p in found.items()]


def layers(model: Model) -> tuple[int, dict[str, int]]:
    """(how many blocks, each parameter's layer): 0 in front of the first block, i in the i-th, their number + 1 behind the last; what
    lies between two blocks (a stage's embedding) goes with the one before."""
    blocks = {name: i for i, name in enumerate(taps(model, "*blocks.*"), start=1)}
    depth, seen, out = len(blocks), 0, {}
    for name, _ in model.named_parameters():
        own = next((i for block, i in blocks.items() if name.startswith(f"{block}.")), None)
        seen = seen if own is None else own
        out[name] = own if own is not None else depth + 1 if seen == depth else seen
    return depth, out


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm of all their gradients together, a scalar; not finite where any of them isn't."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip(parameters: Sequence[nn.Parameter], limit: float, mode: str, norm: Tensor) -> None:
    """In place. norm: the whole gradient, whose 2-norm is given. agc: each unit's, at a share of its weight's norm (Brock et al. 2021)."""
    if mode == "norm":
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return
    for p in parameters:
        if p.grad is not None:
            weight, gradient = _unit_norm(p.detach()).clamp_min(1e-3), _unit_norm(p.grad)
            p.grad.mul_((weight * limit / gradient.clamp_min(1e-6)).clamp_max(1.0))


def _unit_norm(x: Tensor) -> Tensor:
    """The norm of each output unit's weights, shaped to broadcast; a vector is one unit."""
    return x.norm() if x.ndim <= 1 else torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


class Averaged:
    """An exponential moving average of a model's weights and statistics, warmed up so that early steps don't drag the start along."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.values: dict[str, Tensor] = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        state = model.state_dict()
        averaged = [k for k, v in state.items() if v.is_floating_point() and k in self.values and self.values[k].shape == v.shape]
        torch._foreach_lerp_([self.values[k] for k in averaged], [state[k] for k in averaged], 1 - decay)
        for k in {*state} - {*averaged}:  # counters, and whatever a later stage added
            self.values[k] = state[k].detach().clone()
