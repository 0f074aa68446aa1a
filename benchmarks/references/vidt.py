"""ViDT and ViDT+ beside github.com/naver-ai/vidt; its deformable attention in its plain PyTorch version, as its kernel is for GPUs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from references import TIMM, Pair, forward, importing, recorded, squares, step

REPOSITORY = "naver-ai/vidt"


def pairs(clone: Path) -> Iterator[Pair]:
    vision: dict[str, Any] = {"torchvision": {"__version__": "0.9.0"}, "torchvision__ops": {}, "torchvision__ops__boxes": {}}
    parts = {"methods": {"__path__": [str(clone / "methods")]}, "methods__vidt__criterion": {}, "methods__vidt__postprocessor": {}}
    with importing(clone, **{**TIMM, **vision, **parts}, MultiScaleDeformableAttention={}):
        from methods.vidt import detector
        from ops.functions.ms_deform_attn_func import ms_deform_attn_core_pytorch
        from ops.modules import ms_deform_attn

    def sampled(value: Any, shapes: Any, start: Any, where: Any, weights: Any, _: int) -> Any:
        return ms_deform_attn_core_pytorch(value, shapes, where, weights)

    ms_deform_attn.MSDeformAttnFunction = SimpleNamespace(apply=sampled)
    for name in ("vidt_nano", "vidt_plus_nano"):
        r = recorded("vidt", name)
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of its arguments
            theirs = made(detector, **r.constructor)
        nested = SimpleNamespace(tensors=r.inputs[0].float(), mask=r.inputs[1].bool())
        theirs = r.same(theirs, lambda r=r, n=nested: said(r.ours.eval().raw(n.tensors, n.mask)),
                        lambda m=theirs, n=nested: [m.eval()(n)[k] for k in ("pred_logits", "pred_boxes")])  # fmt: skip
        x, mask = torch.randn(1, 3, 192, 256), torch.zeros(1, 192, 256, dtype=torch.bool)
        yield Pair(f"{name}, 192x256", "forward", forward(Raw(r.ours), x, mask), forward(theirs, SimpleNamespace(tensors=x, mask=mask)))
        yield Pair(
            f"{name}, 192x256",
            "train",
            step(r.ours, lambda r=r, x=x, m=mask: squares(r.ours.raw(x, m))),
            step(theirs, lambda t=theirs, x=x, m=mask: squares(t(SimpleNamespace(tensors=x, mask=m)))),
        )


class Raw(nn.Module):
    """Ours up to what the authors' detector says."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        return self.model.raw(*inputs)


def said(raw: Any) -> list[Any]:
    return [raw.logits[:, -1], raw.boxes[:, -1]]


def made(detector: Any, **how: Any) -> nn.Module:
    """Theirs, from the arguments that their command line would take."""
    backbone, _ = getattr(detector, how["backbone"])()
    backbone.finetune_det("vidt", how["det_token_num"], how["pos_dim"], how["cross_indices"])
    transformer = detector.build_deforamble_transformer(SimpleNamespace(**how, reduced_dim=how["pos_dim"], dropout=0.1))
    return detector.Detector(
        backbone,
        transformer,
        how["num_classes"],
        how["det_token_num"],
        aux_loss=how["aux_loss"],
        with_box_refine=how["with_box_refine"],
        epff=detector.FPNFusionModule(backbone.num_channels, fuse_dim=how["pos_dim"]) if how["epff"] else None,
        with_vector=how["with_vector"],
        processor_dct=SimpleNamespace(n_keep=256),
        iou_aware=how["iou_aware"],
        token_label=how["token_label"],
    )
