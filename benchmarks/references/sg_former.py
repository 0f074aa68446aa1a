"""SG-Former beside github.com/OliverRensu/SG-Former."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from references import TIMM, Pair, both, importing, recorded

REPOSITORY = "OliverRensu/SG-Former"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone, **TIMM):
        from sgformer import SGFormer
    r = recorded("sg_former", "sg_former_s")
    r.ours.double()  # as it was recorded: their choice of tokens hangs on the last bits
    x = r.inputs[0].double()
    norm = partial(nn.LayerNorm, eps=r.constructor.pop("norm_eps"))
    with mock.patch.object(np, "float", float, create=True):
        theirs = SGFormer(**r.constructor, norm_layer=norm).double()
    r.same(theirs, lambda: r.ours.eval()(x), lambda: theirs.eval()(x))
    yield from both("sg_former_s, batch 2", r.ours.float(), theirs.float(), torch.randn(2, 3, 224, 224))
