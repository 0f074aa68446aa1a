"""STViT beside github.com/hhb072/STViT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import TIMM, Pair, both, importing, recorded

REPOSITORY = "hhb072/STViT"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone / "models", **TIMM, scipy__io={}, fvcore={}, fvcore__nn={}):
        from stvit import STViT
    r = recorded("stvit", "stvit_small_224")
    theirs = r.same(STViT(**r.constructor, drop_path_rate=0.0))
    yield from both("stvit_small_224, batch 2", r.ours, theirs, torch.randn(2, 3, 224, 224))
