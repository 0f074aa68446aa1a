"""iFormer beside github.com/sail-sg/iFormer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import TIMM, Pair, both, importing, recorded
from references.timm_blocks import Mlp

REPOSITORY = "sail-sg/iFormer"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone / "models", **{**TIMM, "timm__models__layers": {**TIMM["timm__models__layers"], "Mlp": Mlp}}):
        from inception_transformer import InceptionTransformer
    r = recorded("iformer", "iformer_small_224")
    theirs = r.same(InceptionTransformer(**r.constructor))
    yield from both("iformer_small_224, batch 4", r.ours, theirs, torch.randn(4, 3, 224, 224))
