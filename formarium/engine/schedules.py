"""How the learning rate moves over a run: a warm-up, and then one of nine shapes. All but the plateau follow from the step alone."""

from __future__ import annotations

import math
from typing import Any

from formarium.engine.recipes import Recipe


def learning_rate(recipe: Recipe, step: int, steps: int, per_epoch: int, scale: float = 1.0) -> float:
    """Of step 0 .. steps - 1: from warmup_lr to lr over the warm-up (at most half of all steps), then the recipe's schedule, never below
    min_lr. per_epoch: steps in an epoch. scale: what a plateau has left of it."""
    warmup = _warmup(recipe, steps, per_epoch)
    if step < warmup:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * _rise(recipe, (step + 1) / warmup)
    floor = min(recipe.min_lr, recipe.lr)
    left = (steps - step) / max(1, steps - warmup)  # 1 behind the warm-up, near 0 at the end
    match recipe.schedule:
        case "cosine" | "one_cycle":
            return floor + (recipe.lr - floor) * _half_cosine(left)
        case "poly":
            return floor + (recipe.lr - floor) * left**recipe.power
        case "step":
            share = recipe.factor ** sum(step >= round(m * steps) for m in recipe.milestones)
        case "exponential":
            share = recipe.factor ** ((step - warmup) // max(1, per_epoch))
        case "noam":  # with power 1/2 and no hold the inverse square root of the step; else Kim et al.'s extension (arXiv 2206.00888)
            past = step - round(recipe.hold_epochs * per_epoch)
            share = (max(1, warmup) / max(1, warmup, past)) ** recipe.power
        case "wsd":
            return floor + (recipe.lr - floor) * _half_cosine(min(1.0, (steps - step) / (recipe.decay_share * steps)))
        case "plateau":
            share = scale
        case _:
            share = 1.0
    return max(floor, recipe.lr * share)


def momentum(recipe: Recipe, step: int, steps: int, per_epoch: int) -> float | None:
    """Of one cycle with momenta (high, low): high to low while the rate rises, and back while it falls; of any other schedule, None."""
    if recipe.schedule != "one_cycle" or not recipe.cycle_momentum:
        return None
    high, low = recipe.cycle_momentum
    warmup = _warmup(recipe, steps, per_epoch)
    rate = _rise(recipe, (step + 1) / warmup) if step < warmup else _half_cosine((steps - step) / max(1, steps - warmup))
    return high + (low - high) * rate


def _warmup(recipe: Recipe, steps: int, per_epoch: int) -> int:
    return min(round(recipe.warmup_epochs * per_epoch), steps // 2)


def _rise(recipe: Recipe, done: float) -> float:
    return _half_cosine(done) if recipe.schedule == "one_cycle" else done


def _half_cosine(x: float) -> float:
    """0 at 0, 1 at 1, flat at both."""
    return (1 - math.cos(math.pi * x)) / 2


class Plateau:
    """Cuts the rate by the recipe's factor when more than `patience` epochs in a row haven't bettered the held-out metric; not before
    hold_epochs are over."""

    def __init__(self, recipe: Recipe, higher_is_better: bool):
        self.recipe, self.sign = recipe, 1.0 if higher_is_better else -1.0
        self.scale, self.best, self.waited = 1.0, -math.inf, 0

    def see(self, metric: float, epoch: int) -> None:
        """Take note of the held-out metric after so many epochs."""
        if self.sign * metric > self.best:
            self.best, self.waited = self.sign * metric, 0
            return
        self.waited += 1
        if self.waited > self.recipe.patience and epoch >= self.recipe.hold_epochs:
            self.scale, self.waited = self.scale * self.recipe.factor, 0

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "best": self.best, "waited": self.waited}

    def load(self, state: dict[str, Any]) -> None:
        self.scale, self.best, self.waited = state["scale"], state["best"], state["waited"]
