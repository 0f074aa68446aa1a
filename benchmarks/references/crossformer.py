"""CrossFormer beside github.com/cheerss/CrossFormer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import TIMM, Pair, both, importing, recorded

REPOSITORY = "cheerss/CrossFormer"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone / "models", **TIMM):
        from crossformer import CrossFormer
    r = recorded("crossformer", "crossformer_tiny_224")
    theirs = r.same(CrossFormer(**r.constructor))
    yield from both("crossformer_tiny_224, batch 4", r.ours, theirs, torch.randn(4, 3, 224, 224))
