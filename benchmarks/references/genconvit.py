"""GenConViT's first network beside github.com/erprogs/GenConViT, with timm's ConvNeXt and Swin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import Pair, both, importing, recorded

REPOSITORY = "erprogs/GenConViT"


def pairs(clone: Path) -> Iterator[Pair]:
    from speed import timm_model

    timm_model("convnext_tiny")  # timm is there then, without torchvision
    with importing(clone, torchvision={}, torchvision__transforms={}):
        from model.genconvit_ed import GenConViTED
    r = recorded("genconvit", "genconvit_ed_224")
    theirs = r.same(GenConViTED(**r.constructor, pretrained=False), lambda: r.ours.eval()(*r.inputs)[:, 0])
    yield from both("genconvit_ed_224, batch 1", r.ours, theirs, torch.randn(1, 3, 224, 224))
