"""DeiT-LT's student beside github.com/val-iisc/DeiT-LT, whose attention is xFormers': torch's own, in its place."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from references import TIMM, Pair, both, importing, recorded
from references.timm_blocks import Mlp, PatchEmbed

REPOSITORY = "val-iisc/DeiT-LT"


def attention(q: Tensor, k: Tensor, v: Tensor, **other: object) -> Tensor:
    """Of [batch, tokens, heads, width], as xFormers has it."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def pairs(clone: Path) -> Iterator[Pair]:
    stubs = {
        **TIMM,
        "timm__layers": {**TIMM["timm__layers"], "PatchEmbed": PatchEmbed, "Mlp": Mlp},
        "timm__models___builder": {},
        "timm__models___manipulate": {},
        "timm__models___pretrained": {"generate_default_cfgs": dict},
        "timm__models___registry": {"register_model": lambda f: f},
        "xformers": {},
        "xformers__ops": {"memory_efficient_attention": attention, "unbind": torch.unbind},
    }
    with importing(clone, **stubs):
        from deit_models.deit import DistilledVisionTransformer
    r = recorded("deit_lt", "deit_lt_base_224")
    norm = partial(nn.LayerNorm, eps=r.constructor.pop("norm_eps"))
    theirs = r.same(DistilledVisionTransformer(**r.constructor, norm_layer=norm, weight_init="skip"))
    yield from both("deit_lt_base_224, batch 1", r.ours, theirs, torch.randn(1, 3, 224, 224))
