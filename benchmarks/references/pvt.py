"""PVT beside github.com/whai362/PVT: the classifier and the detectors' pyramid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import TIMM, Pair, both, importing, recorded

REPOSITORY = "whai362/PVT"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone / "classification", **TIMM):
        from pvt import pvt_tiny
    r = recorded("pvt", "pvt_tiny")
    theirs = r.same(pvt_tiny())
    yield from both("pvt_tiny, batch 4", r.ours, theirs, torch.randn(4, 3, 224, 224))

    class Registry:
        def register_module(self) -> object:
            return lambda cls: cls

    with importing(clone / "detection", **TIMM, mmdet={}, mmdet__models={}, mmdet__models__builder={"BACKBONES": Registry()},
                   mmdet__utils={}, mmcv={}, mmcv__runner={}):  # fmt: skip
        from pvt import PyramidVisionTransformer, pvt_tiny
    PyramidVisionTransformer.init_weights = lambda self, pretrained=None: None  # it would load a checkpoint
    r = recorded("pvt", "pvt_tiny_pyramid")
    theirs = r.same(pvt_tiny(pretrained=None))
    yield from both("pvt_tiny's pyramid, 384x512", r.ours, theirs, torch.randn(1, 3, 384, 512))
