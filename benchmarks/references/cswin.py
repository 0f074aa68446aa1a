"""CSWin beside github.com/microsoft/CSWin-Transformer: the classifier, on the authors' weights' names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import formarium
from formarium.authors import load_state
from references import Pair, forward, importing, squares, step

REPOSITORY = "microsoft/CSWin-Transformer"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(
        clone / "models",
        timm={},
        timm__data={"IMAGENET_DEFAULT_MEAN": (), "IMAGENET_DEFAULT_STD": ()},
        timm__models={},
        timm__models__helpers={},
        timm__models__layers={"DropPath": nn.Identity, "to_2tuple": lambda n: (n, n), "trunc_normal_": nn.init.trunc_normal_},
        timm__models__registry={"register_model": lambda f: f},
        timm__models__resnet={},
    ):
        from cswin import CSWinTransformer
    theirs = CSWinTransformer(
        patch_size=4, embed_dim=64, depth=[1, 2, 21, 1], split_size=[1, 2, 7, 7], num_heads=[2, 4, 8, 16], mlp_ratio=4.0
    )  # fmt: skip
    ours = formarium.create("cswin_tiny_224")
    load_state(ours, theirs.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-4)
    yield Pair("cswin_tiny_224, batch 1", "forward", forward(ours, x), forward(theirs, x))
    x4 = torch.randn(4, 3, 224, 224)
    yield Pair("cswin_tiny_224, batch 4", "train", step(ours, lambda: squares(ours(x4))), step(theirs, lambda: squares(theirs(x4))))
