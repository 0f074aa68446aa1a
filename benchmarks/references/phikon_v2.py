"""Phikon-v2's encoder, DINOv2's ViT, beside github.com/facebookresearch/dinov2."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from references import Pair, both, importing, recorded

REPOSITORY = "facebookresearch/dinov2"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that xFormers isn't there
        from dinov2.layers import MemEffAttention
        from dinov2.layers.block import Block
        from dinov2.models.vision_transformer import DinoVisionTransformer
    for record, name, batch, modes in (
        ("phikon_v2_vit_small_masked", "ViT-S/16", 4, ("forward", "train")),
        ("phikon_v2_vit_large", "ViT-L/16", 1, ("forward",)),
    ):
        r = recorded("phikon_v2", record)
        del r.constructor["norm_eps"]  # always 1e-6
        block = partial(Block, attn_class=MemEffAttention)
        theirs = r.same(DinoVisionTransformer(**r.constructor, block_fn=block))
        yield from both(f"{name}, batch {batch}", r.ours, theirs, torch.randn(batch, 3, 224, 224), modes=modes)
