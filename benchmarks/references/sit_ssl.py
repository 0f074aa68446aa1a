"""SiT (self-supervised) beside github.com/Sara-Ahmed/SiT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import Pair, both, importing, recorded

REPOSITORY = "Sara-Ahmed/SiT"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone, datasets={}, datasets__load_dataset={}, utils={}, torchvision={}):
        from main import FullPipline
        from vision_transformer import CLSHead, RECHead, vit_small
    r = recorded("sit_ssl", "sit_ssl_small")
    theirs = r.same(FullPipline(vit_small(img_size=[224]), CLSHead(384, 256), RECHead(384)))
    yield from both("sit_ssl_small, batch 2", r.ours, theirs, torch.randn(2, 3, 224, 224))
