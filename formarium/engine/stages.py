"""A stage of training at work: its turns, each with an optimiser, a loss and the parameters it moves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from formarium.engine.loader import Batch, parts
from formarium.engine.optim import clip, gradient_norm, optimiser
from formarium.engine.recipes import Recipe
from formarium.engine.schedules import learning_rate, momentum
from formarium.errors import BadInput, FormariumError
from formarium.model import Model, Stage


class Diverged(FormariumError):
    """The loss, or its gradient, is no longer a finite number."""


class Objective(nn.Module):
    """A model whose forward is one of its losses, so that whatever wraps a forward (autocast, DDP) wraps the loss."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, loss: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(the total to start backward from, the terms to log)"""
        losses = getattr(self.model, loss)(batch)
        return losses.total, {k: torch.as_tensor(v).detach() for k, v in losses.terms.items()}


@dataclass
class _Turn:
    loss: str
    repeats: int
    recipe: Recipe
    optimiser: Any  # torch's, as Fabric wraps it
    moved: list[nn.Parameter]
    others: list[nn.Parameter]  # what the stage's other turns move


class Training:
    """One stage's optimisers, and `step`, which plays every turn on a batch."""

    def __init__(self, fabric: Fabric, model: Model, stage: Stage, recipe: Recipe, steps: range, per_epoch: int):
        self.fabric, self.steps, self.per_epoch = fabric, steps, per_epoch
        recipes = [recipe.with_(**turn.recipe) for turn in stage.turns]
        optimisers = [optimiser(model, r, turn.train) for r, turn in zip(recipes, stage.turns, strict=True)]
        moved = [[p for group in o.param_groups for p in group["params"]] for o in optimisers]
        every = {id(p): p for own in moved for p in own}
        self.still = [p for p in model.parameters() if p.requires_grad and id(p) not in every]
        _require_grad(self.still, False)  # nobody moves them in this stage
        self.objective, *wrapped = fabric.setup(Objective(model), *optimisers)
        self.turns = [
            _Turn(turn.loss, turn.repeats, r, o, own, [p for i, p in every.items() if i not in {*map(id, own)}])
            for turn, r, o, own in zip(stage.turns, recipes, wrapped, moved, strict=True)
        ]

    def close(self) -> None:
        _require_grad(self.still, True)

    def step(self, batch: Batch, at: int, scale: float = 1.0) -> dict[str, float]:
        """Every turn once, or as often as it repeats; scale: what a plateau has left of the learning rate.

        Returns the loss, its terms, the gradient's norm and the learning rate; a stage of several turns has them for each, as "TURN.loss"
        and so on, and the sum of the losses as "loss". Raises Diverged.
        """
        said: dict[str, float] = {}
        for turn in self.turns:
            when = (at - self.steps.start, len(self.steps), self.per_epoch)
            rate, beta = learning_rate(turn.recipe, *when, scale), momentum(turn.recipe, *when)
            for group in turn.optimiser.param_groups:
                group["lr"] = rate * group["scale"]
                if beta is not None:
                    group |= {"momentum": beta} if "momentum" in group else {"betas": (beta, group["betas"][1])}
            with _frozen(turn.others):
                for _ in range(turn.repeats):
                    terms = self._move(turn, batch, at)
            prefix = f"{turn.loss}." if len(self.turns) > 1 else ""
            said |= {f"{prefix}{k}": v for k, v in {**terms, "lr": rate}.items()}
        said.setdefault("loss", sum(said[f"{name}.loss"] for name in dict.fromkeys(t.loss for t in self.turns) if f"{name}.loss" in said))
        return said

    def _move(self, turn: _Turn, batch: Batch, at: int) -> dict[str, float]:
        """One step of one optimiser. Numbers are means over the parts of the batch and the processes."""
        turn.optimiser.zero_grad()
        pieces = parts(batch, turn.recipe.accumulate)
        sums: dict[str, Any] = {}
        for i, (piece, weight) in enumerate(pieces):
            with self.fabric.no_backward_sync(self.objective, enabled=i + 1 < len(pieces)):
                total, terms = self.objective(turn.loss, piece)
                self.fabric.backward(total * weight)
            for name, value in {"loss": total.detach(), **terms}.items():
                sums[name] = sums.get(name, 0.0) + value.float() * weight
        sums["grad_norm"] = gradient_norm(turn.moved)
        means = self.fabric.all_reduce(torch.stack([*sums.values()]).float(), reduce_op="mean")
        said = dict(zip(sums, means.tolist(), strict=True))  # type: ignore[union-attr]
        for name in ("loss", "grad_norm"):
            if not abs(said[name]) < float("inf"):
                what = turn.loss if name == "loss" else f"the gradient of {turn.loss}"
                raise Diverged(f"{what} is {said[name]} at step {at + 1} (a lower lr, a longer warm-up or clip_grad usually help)")
        if turn.recipe.clip_grad:
            clip(turn.moved, turn.recipe.clip_grad, turn.recipe.clip_mode, sums["grad_norm"])
        turn.optimiser.step()
        return said

    # for checkpoints

    def state(self) -> list[dict[str, Any]]:
        return [turn.optimiser.state_dict() for turn in self.turns]

    def load(self, states: list[dict[str, Any]]) -> None:
        for turn, state in zip(self.turns, states, strict=True):
            turn.optimiser.load_state_dict(state)


def spans(stages: list[Stage], steps: int) -> list[range]:
    """The steps of each stage, by their shares. BadInput where some stage would get none."""
    total = sum(s.share for s in stages)
    ends = [round(steps * done / total) for done in accumulate(s.share for s in stages)]
    out = [range(first, last) for first, last in pairwise([0, *ends])]
    if not all(out):
        raise BadInput("steps", expected=f"enough for {len(stages)} stages ({', '.join(s.name for s in stages)})", got=str(steps))
    return out


def _require_grad(parameters: Iterable[nn.Parameter], wanted: bool) -> None:
    for p in parameters:
        p.requires_grad_(wanted)


@contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    _require_grad(parameters, False)
    try:
        yield
    finally:
        _require_grad(parameters, True)
