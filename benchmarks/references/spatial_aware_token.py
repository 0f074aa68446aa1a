"""The spatial-aware token beside github.com/wpy1999/SAT."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from references import TIMM, Pair, forward, importing, recorded, step

REPOSITORY = "wpy1999/SAT"


def pairs(clone: Path) -> Iterator[Pair]:
    plotting = {"skimage": {}, "matplotlib": {}, "matplotlib__pyplot": {}, "cv2": {}}
    with importing(clone, **TIMM, **plotting):
        from Model.SAT import SAT
    r = recorded("spatial_aware_token", "spatial_aware_token_tiny")
    norm = partial(nn.LayerNorm, eps=r.constructor.pop("norm_eps"))
    theirs = SAT(**r.constructor, norm_layer=norm)
    r.same(theirs, lambda: (lambda out: (out.logits, out.map))(r.ours.eval()(*r.inputs)), lambda: theirs.eval()(*r.inputs, phase="test"))
    x, label = torch.randn(4, 3, 224, 224), torch.randint(0, 200, (4,))
    batch = {"image": x * r.ours.std + r.ours.mean, "label": label}

    class Tested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = theirs

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x, phase="test")

    def loss() -> Tensor:
        logits, area, normalisation = theirs(x, phase="train")
        return F.cross_entropy(logits, label) + (area.mean(0) - 0.25).abs() + normalisation.mean(0)

    name = "spatial_aware_token_tiny, batch 4"
    yield Pair(name, "forward", forward(r.ours, x), forward(Tested(), x))
    yield Pair(name, "train", step(r.ours, lambda: r.ours.loss(batch).total), step(theirs, loss))
