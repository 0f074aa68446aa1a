"""Schedules of an optimiser's own numbers (learning rate, weight decay, ...) that a model brings with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

_running: list[tuple[Any, Any]] = []
Change = Callable[[torch.optim.Optimizer, dict[str, Any]], None]


class StepSchedule:
    """Lets a model's method change the parameter groups of whichever optimiser moves some of its parameters, right before each step.

    change: a bound method (optimiser, group) -> None; it is held weakly, and the schedule ends with its owner or by `off()`.
    An optimiser's `defaults` hold what it was made with, so that a rate can be relative to the recipe's.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], change: Change):
        self.ids = {id(p) for p in parameters}
        ids, held = self.ids, weakref.WeakMethod(change)  # type: ignore[arg-type]

        def before(optimiser: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            own = held()
            if own is None:  # taken out with the next one: hooks can't go while they are run through
                return
            for group in optimiser.param_groups:
                if any(id(p) in ids for p in group["params"]):
                    own(optimiser, group)

        for other, handle in [*_running]:
            if other() is None:
                handle.remove()
                _running.remove((other, handle))
        self.handle = register_optimizer_step_pre_hook(before)
        _running.append((held, self.handle))

    def off(self) -> None:
        self.handle.remove()


def piecewise_linear(progress: float, values: tuple[float, ...]) -> float:
    """From values[0] at 0 through equal stretches to values[-1] at 1."""
    stretches = len(values) - 1
    at = min(max(progress, 0.0), 1.0) * stretches
    i = min(int(at), stretches - 1)
    return values[i] + (values[i + 1] - values[i]) * (at - i)
