"""CSWin beside github.com/microsoft/CSWin-Transformer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import TIMM, Pair, both, importing, recorded

REPOSITORY = "microsoft/CSWin-Transformer"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone / "models", **TIMM):
        from cswin import CSWinTransformer
    r = recorded("cswin", "cswin_tiny_224")
    theirs = r.same(CSWinTransformer(**r.constructor))
    yield from both("cswin_tiny_224, batch 4", r.ours, theirs, torch.randn(4, 3, 224, 224))
