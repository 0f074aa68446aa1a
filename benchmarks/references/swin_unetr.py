"""Swin UNETR beside MONAI's, which is the authors'."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

import formarium
from references import Pair, both

PEER, NEEDS = "MONAI", ("monai",)


def pairs(clone: Path) -> Iterator[Pair]:
    from monai.networks.nets import SwinUNETR

    ours = formarium.create("swin_unetr", feature_size=24)
    theirs = SwinUNETR(in_channels=4, out_channels=3, feature_size=24, spatial_dims=3)
    yield from both("24 features, 64^3 voxels, batch 1", ours, theirs, torch.randn(1, 4, 64, 64, 64))
