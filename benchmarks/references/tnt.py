"""TNT beside github.com/huawei-noah/CV-Backbones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import TIMM, Pair, both, importing, recorded

REPOSITORY = "huawei-noah/CV-Backbones"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone / "tnt_pytorch", **TIMM):
        from tnt import TNT
    r = recorded("tnt", "tnt_s_patch16_224")
    theirs = r.same(TNT(**r.constructor))
    yield from both("tnt_s_patch16_224, batch 2", r.ours, theirs, torch.randn(2, 3, 224, 224))
