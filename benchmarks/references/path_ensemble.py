"""The path ensemble of a DeiT-Ti beside the plain network it equals, as timm has it: what telling the paths apart costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import Pair, both, recorded
from references.timm_blocks import VisionTransformer

PEER = "timm"  # no code of the paper is public


def pairs(clone: Path) -> Iterator[Pair]:
    r = recorded("path_ensemble", "path_ensemble_deit_tiny")
    theirs = r.same(VisionTransformer(**r.constructor), lambda: r.ours.eval()(*r.inputs))
    yield from both("path_ensemble_deit_tiny, batch 4", r.ours, theirs, torch.randn(4, 3, 224, 224))
