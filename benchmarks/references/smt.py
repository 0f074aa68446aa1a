"""SMT beside github.com/AFeng-x/SMT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import TIMM, Pair, both, importing, recorded

REPOSITORY = "AFeng-x/SMT"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone / "models", **TIMM, ptflops={}, thop={}):
        from smt import SMT
    r = recorded("smt", "smt_t")
    theirs = r.same(SMT(**r.constructor))
    yield from both("smt_t, batch 4", r.ours, theirs, torch.randn(4, 3, 224, 224))
