"""SpectFormer, plain and as a pyramid, beside github.com/badripatro/SpectFormers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from references import TIMM, Pair, both, importing, recorded, squares, step

REPOSITORY = "badripatro/SpectFormers"


def pairs(clone: Path) -> Iterator[Pair]:
    stubs = {**TIMM, "numpy__lib__arraypad": {}, "pytorch_wavelets": {}}
    x = torch.randn(2, 3, 224, 224)
    with importing(clone / "vanilla_architecture", **stubs):
        from spectformer import SpectFormer
    r = recorded("spectformer", "spectformer_xs_224")
    for fixed in ("alpha", "num_heads"):  # in their code: 4 and 6, as in this variant
        del r.constructor[fixed]
    norm = partial(nn.LayerNorm, eps=r.constructor.pop("layer_norm_eps"))
    yield from both("spectformer_xs_224, batch 2", r.ours, r.same(SpectFormer(**r.constructor, norm_layer=norm)), x)

    with importing(clone / "hierarchical_architecture", **stubs):
        from spectformer import SpectFormer as Pyramid
    r = recorded("spectformer", "spectformer_h_s_224")
    norm = partial(nn.LayerNorm, eps=r.constructor.pop("layer_norm_eps"))
    ours, theirs, name = r.ours, r.same(Pyramid(**r.constructor, norm_layer=norm)), "spectformer_h_s_224, batch 2"
    yield from both(name, ours, theirs, x, modes=("forward",))
    with mock.patch.object(np, "int", int, create=True):  # in training both mix tokens and say something of every token
        box = (1, 2, 4, 6)
        yield Pair(name, "train", step(ours, lambda: squares(ours.token_outputs(x, box)[:2])), step(theirs, lambda: squares(theirs(x)[:2])))
