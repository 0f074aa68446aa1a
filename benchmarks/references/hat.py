"""HAT beside github.com/XPixelGroup/HAT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from references import Pair, both, importing, recorded

REPOSITORY = "XPixelGroup/HAT"


def pairs(clone: Path) -> Iterator[Pair]:
    class Registry:
        def register(self, *a: object) -> object:
            return lambda cls: cls

    util = {"to_2tuple": lambda n: (n, n), "trunc_normal_": nn.init.trunc_normal_}
    with importing(clone / "hat" / "archs", basicsr={}, basicsr__utils={}, basicsr__utils__registry={"ARCH_REGISTRY": Registry()},
                   basicsr__archs={}, basicsr__archs__arch_util=util):  # fmt: skip
        from hat_arch import HAT
    r = recorded("hat", "hat_s_x4")
    theirs = r.same(HAT(**r.constructor))
    yield from both("hat_s_x4, 64x64", r.ours, theirs, torch.rand(1, 3, 64, 64))
