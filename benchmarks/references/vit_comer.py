"""ViT-CoMer beside github.com/Traffic-X/ViT-CoMer, its deformable attention being the PyTorch version that ships with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from references import TIMM, Pair, both, importing, recorded
from references.timm_blocks import Mlp

REPOSITORY = "Traffic-X/ViT-CoMer"


class Registry:
    def register_module(self) -> object:
        return lambda cls: cls


def pairs(clone: Path) -> Iterator[Pair]:
    stubs = {
        **TIMM,
        "timm__models__layers": {**TIMM["timm__models__layers"], "Mlp": Mlp},
        "mmcv": {},
        "mmcv__runner": {"BaseModule": nn.Module},
        "mmcv_custom": {},
        "mmseg": {},
        "mmseg__utils": {},
        "mmseg__models": {},
        "mmseg__models__builder": {"BACKBONES": Registry()},
        "MultiScaleDeformableAttention": {},
        "backbones": {"__path__": [str(clone / "segmentation" / "mmseg_custom" / "models" / "backbones")]},
    }
    with importing(clone / "detection", **stubs), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from backbones.vit_comer import ViTCoMer
        from ops.functions.ms_deform_attn_func import ms_deform_attn_core_pytorch
        from ops.modules import ms_deform_attn

    class OnCPU:
        @staticmethod
        def apply(value: Tensor, shapes: Tensor, start: Tensor, places: Tensor, weights: Tensor, at_once: int) -> Tensor:
            return ms_deform_attn_core_pytorch(value, shapes.tolist(), places, weights)

    ms_deform_attn.MSDeformAttnFunction = OnCPU
    r = recorded("vit_comer", "vit_comer_tiny_seg")
    with mock.patch("torch.nn.SyncBatchNorm", nn.BatchNorm2d):
        made = ViTCoMer(**r.constructor)
    theirs = r.same(made)
    yield from both("vit_comer_tiny_seg, batch 1", r.ours, theirs, torch.randn(1, 3, 224, 224))
