"""ViTPose beside transformers' (the authors' code stands on MMPose)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import formarium
from references import Pair, both

PEER, NEEDS = "transformers", ("transformers",)


class Heatmaps(nn.Module):
    """Theirs, with the two deconvolutions of the paper's classic head."""

    def __init__(self):
        from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

        super().__init__()
        backbone = VitPoseBackboneConfig(image_size=(256, 192), hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
        self.model = VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17, use_simple_decoder=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).heatmaps


def pairs(clone: Path) -> Iterator[Pair]:
    yield from both("vitpose_base, batch 1", formarium.create("vitpose_base", drop_path=0.0), Heatmaps(), torch.randn(1, 3, 256, 192))
