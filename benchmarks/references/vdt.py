"""VDT beside github.com/RERV/VDT, whose blocks are timm's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import TIMM, Pair, both, importing, recorded
from references.timm_blocks import Attention, Mlp, PatchEmbed

REPOSITORY = "RERV/VDT"


def pairs(clone: Path) -> Iterator[Pair]:
    blocks = {"PatchEmbed": PatchEmbed, "Attention": Attention, "Mlp": Mlp}
    with importing(clone, **{**TIMM, "timm__models__vision_transformer": blocks}):
        from models import VDT
    r = recorded("vdt", "vdt_s_2")
    theirs = r.same(VDT(**r.constructor))
    x, t = torch.randn(1, 8, 4, 16, 16), torch.randint(0, 1000, (1,))
    yield from both("vdt_s_2, 8 frames of 16x16", r.ours, theirs, x, t)
