"""CrossViT beside github.com/IBM/CrossViT, whose blocks are timm's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from references import TIMM, Pair, both, importing, recorded
from references.timm_blocks import Block, Mlp

REPOSITORY = "IBM/CrossViT"


def pairs(clone: Path) -> Iterator[Pair]:
    blocks = {"_cfg": lambda **k: k, "Mlp": Mlp, "Block": Block}
    with importing(clone / "models", **{**TIMM, "timm__models__vision_transformer": blocks}):
        from crossvit import VisionTransformer
    r = recorded("crossvit", "crossvit_tiny_224")
    norm = partial(nn.LayerNorm, eps=r.constructor.pop("norm_eps"))
    theirs = r.same(VisionTransformer(**r.constructor, norm_layer=norm))
    yield from both("crossvit_tiny_224, batch 4", r.ours, theirs, torch.randn(4, 3, 240, 240))
