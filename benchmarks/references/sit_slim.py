"""SiT (token slimming) beside github.com/Sense-X/SiT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import TIMM, Pair, forward, importing, recorded, squares, step

REPOSITORY = "Sense-X/SiT"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone / "models", **TIMM):
        from lvvit import LVViT
    r = recorded("sit_slim", "sit_slim_t_224")
    ours = r.ours
    theirs = r.same(LVViT(**r.constructor), lambda: ours.eval().tokens(*r.inputs, recover=False))
    x, name = torch.randn(2, 3, 224, 224), "sit_slim_t_224, batch 2"
    yield Pair(name, "forward", forward(ours, x), forward(theirs, x))
    yield Pair(  # with the tokens spread again
        name,
        "train",
        step(ours, lambda: squares(ours.tokens(x, recover=True))),
        step(theirs, lambda: squares(theirs(x)[1:])),
    )
