"""Gated class-attention beside github.com/OcraM17/GCAB-CFDC."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from references import TIMM, Pair, forward, importing, on_cpu, recorded, squares, step

REPOSITORY = "OcraM17/GCAB-CFDC"


class Answer(nn.Module):
    """Every task's logits, at s and with or without the projectors: theirs or ours."""

    def __init__(self, model: nn.Module, method: str, *options: object):
        super().__init__()
        self.model, self.method, self.options = model, method, options

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model, self.method)(x, *self.options)[0]


def pairs(clone: Path) -> Iterator[Pair]:
    package = {"continual": {"__path__": [str(clone / "continual")]}}
    with importing(clone, **TIMM, **package):
        from continual.convit import ConVit
        from continual.GCAB import GCAB
    r = recorded("gated_class_attention", "gated_class_attention_cifar_10splits_task3")
    said = r.constructor
    seen, first, more, tasks = (said.pop(k) for k in ("tasks_seen", "first_task_classes", "increment", "num_tasks"))
    options = {k: said.pop(k) for k in ("individual_classifier", "smax")}
    with on_cpu():
        theirs = GCAB(ConVit(num_classes=first, **said), first, num_tasks=tasks, **options)
        for _ in range(seen - 1):
            theirs.add_model(more)
            width, tokens = theirs.embed_dim, theirs.pos_embed.shape[1]
            layers = nn.Conv2d(width, width, 1), nn.LayerNorm((width, 1, tokens)), nn.ReLU(), nn.Conv2d(width, width, 1)
            theirs.projectors.append(nn.Sequential(*layers))
        whole = Answer(theirs, "forward", options["smax"], True)
        r.same(theirs, lambda: r.ours.eval().answer(*r.inputs).logits, lambda: whole.eval()(*r.inputs))
        x, name = torch.randn(16, 3, 32, 32), "cifar_10splits, 3 tasks seen, batch 16"
        yield Pair(name, "forward", forward(Answer(r.ours, "answer"), x), forward(whole, x))
        ours, theirs = Answer(r.ours, "answer", 5.0, False), Answer(theirs, "forward", 5.0, None)
        yield Pair(name, "train", step(ours, lambda: squares(ours(x))), step(theirs, lambda: squares(theirs(x))))
