"""FCOS as MMDetection names it, which backbones' detection repositories build on: a backbone under its own authors' names, a neck, a
head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from formarium.authors import State
from formarium.authors.semantic_fpn import OnBackbone

TOWERS = (("cls_convs", "class_tower"), ("reg_convs", "box_tower"))


class _FCOS(OnBackbone):
    """Their neck counts the extra levels' convolutions on from the others', their scales are one parameter a level."""

    def import_state(self, state: Mapping[str, Tensor], model: Any) -> State:
        out = super().import_state(state, model)
        levels = len(model.neck.lateral)
        scales = sorted((k for k in out if k.startswith("bbox_head.scales.")), key=lambda k: int(k.split(".")[2]))
        if scales:
            out["head.scales"] = out[scales[0]].new_tensor([float(out.pop(k)) for k in scales])
        for name in [k for k in out if k.startswith("neck.smooth.") and int(k.split(".")[2]) >= levels]:
            _, _, i, part = name.split(".")
            out[f"neck.coarser.{int(i) - levels}.{part}"] = out.pop(name)
        return out

    def export_state(self, model: Any) -> State:
        out = super().export_state(model)
        out |= {f"bbox_head.scales.{i}.scale": v for i, v in enumerate(out.pop("head.scales"))}
        levels = len(model.neck.lateral)
        for name in [k for k in out if k.startswith("neck.coarser.")]:
            _, _, i, part = name.split(".")
            out[f"neck.fpn_convs.{int(i) + levels}.conv.{part}"] = out.pop(name)
        return out


authors = _FCOS(
    names=[
        ("neck.lateral_convs.{i}.conv", "neck.lateral.{i}"),
        ("neck.fpn_convs.{i}.conv", "neck.smooth.{i}"),
        *(
            (f"bbox_head.{theirs}.{j}.{part}", f"head.{ours}.{3 * j + k}")
            for theirs, ours in TOWERS
            for j in range(8)
            for k, part in enumerate(("conv", "bn"))
        ),
        ("bbox_head.conv_cls", "head.classify"),
        ("bbox_head.conv_reg", "head.measure"),
        ("bbox_head.conv_centerness", "head.centre"),
    ],
)
