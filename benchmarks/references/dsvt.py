"""DSVT's backbone beside github.com/Haiyang-W/DSVT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from references import Pair, both, importing, recorded

REPOSITORY = "Haiyang-W/DSVT"


class Settings(dict):  # EasyDict's way to be asked
    def __init__(self, values: dict[str, Any]):
        super().__init__({k: Settings(v) if isinstance(v, dict) else v for k, v in values.items()})

    def __getattr__(self, name: str) -> Any:
        return self[name]


def rank_in_group(group: Tensor) -> Tensor:
    """Of each member, in the order of the input; theirs is a kernel for GPUs."""
    order = group.argsort(stable=True)
    ranked = group[order]
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group)) - torch.searchsorted(ranked, ranked)
    return rank


class Ours(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.backbone = model.backbone

    def forward(self, features: Tensor, at: Tensor) -> Tensor:
        return self.backbone(features, at, int(at[:, 0].max()) + 1)[0]


class Theirs(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, at: Tensor) -> Tensor:
        return self.model({"voxel_features": features, "voxel_coords": at})["voxel_features"]


def pairs(clone: Path) -> Iterator[Pair]:
    root = clone / "pcdet"
    folders = {name: {"__path__": [str(root.joinpath(*name.split("__")[1:]))]} for name in (
        "pcdet", "pcdet__models", "pcdet__models__backbones_3d", "pcdet__models__model_utils")}  # fmt: skip
    kernels = {
        "pcdet__ops": {},
        "pcdet__ops__ingroup_inds": {},
        "pcdet__ops__ingroup_inds__ingroup_inds_op": {"ingroup_inds": rank_in_group},
    }
    tensorrt = {"pcdet__models__model_utils__tensorrt_utils": {}, "pcdet__models__model_utils__tensorrt_utils__trtwrapper": {}}
    with importing(clone, **folders, **kernels, **tensorrt):
        from pcdet.models.backbones_3d.dsvt import DSVT
    for name in ("dsvt_pillar", "dsvt_pillar_nuscenes"):
        r = recorded("dsvt", name)
        theirs = DSVT(Settings(r.constructor))
        x, at = r.inputs[0].float(), r.inputs[1].long()
        ours, other = Ours(r.ours), Theirs(theirs)
        r.same(theirs, lambda m=ours, x=x, at=at: m.eval()(x, at), lambda m=other, x=x, at=at: m.eval()(x, at))
        dim = r.constructor["d_model"][0]
        at = pillars(1500, r.constructor["INPUT_LAYER"]["sparse_shape"][0])
        yield from both(f"{name}, {len(at)} pillars", ours, other, torch.randn(len(at), dim), at)


def pillars(count: int, across: int) -> Tensor:
    """Different cells of one scene, denser in its middle: int64 [pillars, 4], (batch, z, y, x)."""
    place = (across / 2 + across / 7 * torch.randn(count, 2)).clamp(0, across - 1).long().unique(dim=0)
    place = place[torch.randperm(len(place))]
    return torch.cat([torch.zeros_like(place), place], 1)
