"""Fine-tuning with the first blocks frozen: the supervised probing of SUFO (Hsu et al. 2024), for any model with taps."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import trace
from formarium.model import Model
from formarium.tasks.batches import joined, on, size_of, take


@dataclass(frozen=True)
class FineTune:
    """How the paper fine-tunes: AdamW, warm-up and decay both linear, classes drawn evenly.

    lr, epochs, batch_size: None stands for the paper's (7.6e-6, 25, 8) where the model is of a published size, and for what its card
    trains on sample data with (5 epochs) where it is a small one for demonstrations.
    """

    lr: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    weight_decay: float = 0.01
    eps: float = 1e-8
    warmup: float = 0.2  # share of the steps
    clip_grad: float = 1.0
    even_classes: bool = True

    def of(self, model: Model) -> tuple[float, int, int]:
        """(lr, epochs, batch size) for this model."""
        published = model.card is None or model.variant in model.card.published
        demo: Mapping[str, Any] = {} if published else model.card.demo  # type: ignore[union-attr]
        lr, epochs, size = (7.6e-6, 25, 8) if published else (float(demo.get("lr", 1e-3)), 5, int(demo.get("batch_size", 64)))
        return self.lr or lr, self.epochs or epochs, self.batch_size or size


def upstream(model: Model, batch: Mapping[str, Any], tap: str) -> list[str]:
    """Names of the parameters that the features at a tap depend on."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    features = trace(model, on(model.device, batch), at=tap, grad=True)[tap].tokens
    grads = torch.autograd.grad(features.sum(), [p for _, p in named], allow_unused=True)
    return [name for (name, _), grad in zip(named, grads, strict=True) if grad is not None]


def freezing_tap(model: Model, batch: Mapping[str, Any], k: int) -> str:
    """The tap up to which freezing the first k blocks freezes (0: only the first tokeniser)."""
    names = [*trace(model, on(model.device, batch))]
    wanted = "*tokens*" if k < 1 else "*blocks.*"
    found = [n for n in names if fnmatchcase(n, wanted)]
    if not found or k > len(found):
        raise BadInput("freeze", expected=f"a number of blocks up to {len(found)}", got=str(k))
    return found[max(k, 1) - 1]


def freeze_and_tune(start: Model, train: Sequence[Mapping[str, Any]], k: int | None, how: FineTune, seed: int = 0) -> tuple[Model, int]:
    """A copy of `start`, fine-tuned on the training batches with its first k blocks frozen (None: nothing), and how many parameters were.

    Norms with running statistics stand still where their parameters do.
    """
    model = copy.deepcopy(start)
    few = take(train[0], range(min(2, size_of(train[0]))))
    frozen = {*upstream(model.eval(), few, freezing_tap(model, few, k))} if k is not None else set()
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and name not in frozen)
    keys = [key for key, value in train[0].items() if isinstance(value, Tensor)]
    data = {key: joined(train, key) for key in keys}
    lr, epochs, size = how.of(start)
    n = len(data["label"])
    steps = max(1, epochs * -(-n // size))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, eps=how.eps, weight_decay=how.weight_decay)
    rise = max(1, round(how.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min((s + 1) / rise, (steps - s) / max(1, steps - rise)))
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / data["label"].bincount().clamp_min(1).double()[data["label"]] if how.even_classes else torch.ones(n).double()
    _train_mode(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(steps):
            chosen = torch.multinomial(weights, min(size, n), replacement=how.even_classes, generator=generator)
            loss = model.loss(on(model.device, {key: value[chosen] for key, value in data.items()})).total
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], how.clip_grad)
            optimiser.step()
            schedule.step()
    return model.eval(), sum(p.numel() for name, p in model.named_parameters() if name in frozen)


def _train_mode(model: Model) -> None:
    model.train()
    for module in model.modules():
        own = [*module.parameters(recurse=False)]
        if own and not any(p.requires_grad for p in own):
            module.eval()
