"""Semantic FPN and UPerNet as MMSegmentation's family names them (github.com/whai362/PVT and others build on it): a backbone under its own
authors' names, a neck, a decode head, an auxiliary head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from formarium.authors import Authors, State, authors_of

NORMS = {"batch": "bn", "group": "gn"}


def _conv(theirs: str, ours: str) -> list[tuple[str, str]]:
    """A convolution with its norm."""
    return [(f"{theirs}.conv", f"{ours}.0"), (f"{theirs}.bn", f"{ours}.1")]


class OnBackbone(Authors):
    """The backbone's weights go by its own system's key map."""

    def import_state(self, state: Mapping[str, Tensor], model: Any) -> State:
        norm = NORMS[getattr(model.config, "norm", "group")]
        own = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        rest = {k.replace(f".{norm}.", ".bn."): v for k, v in state.items() if not k.startswith("backbone.")}
        if model.backbone.card is not None:
            own = authors_of(model.backbone.card.slug).import_state(own, model.backbone)
        return {**{f"backbone.{k}": v for k, v in own.items()}, **super().import_state(rest, model)}

    def export_state(self, model: Any) -> State:
        norm, card = NORMS[getattr(model.config, "norm", "group")], model.backbone.card
        own = authors_of(card.slug).export_state(model.backbone) if card is not None else dict(model.backbone.state_dict())
        rest = {self.rename(k, forward=False): v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
        return {**{f"backbone.{k}": v for k, v in own.items()}, **{k.replace(".bn.", f".{norm}."): v for k, v in rest.items()}}


authors = OnBackbone(
    names=[
        ("neck.lateral_convs.{i}.conv", "neck.lateral.{i}"),
        ("neck.fpn_convs.{i}.conv", "neck.smooth.{i}"),
        *(rule for j in range(4) for rule in _conv(f"decode_head.scale_heads.{{i}}.{2 * j}", f"decoder.levels.{{i}}.{j}")),
        ("decode_head.psp_modules.{i}.1.conv", "decoder.pool.reduce.{i}.0"),
        ("decode_head.psp_modules.{i}.1.bn", "decoder.pool.reduce.{i}.1"),
        *_conv("decode_head.bottleneck", "decoder.pool.fuse"),
        *_conv("decode_head.lateral_convs.{i}", "decoder.lateral.{i}"),
        *_conv("decode_head.fpn_convs.{i}", "decoder.smooth.{i}"),
        *_conv("decode_head.fpn_bottleneck", "decoder.fuse_all"),
        ("decode_head.conv_seg", "decoder.classify"),
        *_conv("auxiliary_head.convs.0", "auxiliary.0"),
        ("auxiliary_head.conv_seg", "auxiliary.2"),
    ],
)
