"""ARBEx's extractor beside github.com/takihasan/ARBEx."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import TIMM, Pair, both, importing, recorded

REPOSITORY = "takihasan/ARBEx"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone / "arbex", **TIMM):
        from models.ir import IR50
        from models.mobilefacenet import MobileFaceNet
        from models.poster import PosterV2
    r = recorded("arbex", "arbex_extractor")
    theirs = r.same(PosterV2(MobileFaceNet(), IR50(), **r.constructor))
    yield from both("arbex_extractor, batch 2, 112x112", r.ours, theirs, torch.randn(2, 3, 112, 112))
