"""DualToken-ViT's parts that are LightViT's, beside github.com/hunto/LightViT: stem, merging of patches and global tokens, gated
feed-forward network, one after the other. The paper's own code isn't public."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formarium.authors.dualtoken_vit import authors
from formarium.engine.records import read_record
from formarium.nn.light import GatedMLP, LightStem, MergePatches
from references import TIMM, Pair, both, importing

REPOSITORY = "hunto/LightViT"
RECORD = Path(__file__).resolve().parents[2] / "tests" / "parity" / "dualtoken_vit" / "dualtoken_vit_lightvit_parts.safetensors"


class Registry:
    def register_module(self, *a: Any, **k: Any) -> Any:
        return lambda cls: cls


def same(*a: Any, **k: Any) -> Any:
    return lambda fn: fn


class Ours(nn.ModuleDict):
    """image: float [b, 3, h, w]; tokens: float [b, n, dim], the global ones. Returns image tokens and global tokens."""

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        _, x, grid = self["stem"](image)
        x, _ = self["merge"](x, grid)
        return self["mlp"](x), self["merge"].follow(tokens)


class Theirs(nn.ModuleDict):
    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x, grid = self["stem"](image)
        x, _ = self["merge"](torch.cat([tokens, x], 1), *grid)
        n = tokens.shape[1]
        return self["mlp"](x[:, n:]), x[:, :n]


def pairs(clone: Path) -> Iterator[Pair]:
    mm = {"mmdet": {}, "mmdet__models": {}, "mmdet__models__builder": {"BACKBONES": Registry()}, "mmcv": {}}
    timm = {**TIMM, "timm__models__layers": {**TIMM["timm__models__layers"], "drop_path": None}}
    runner = {"auto_fp16": same, "force_fp32": same, "BaseModule": nn.Module}
    with importing(clone / "detection", **timm, **mm, mmcv__runner=runner):
        import lightvit as code
    record = read_record(RECORD)
    said = record.header["reference"]["constructor"]
    dim, out, n = said["stem_dim"], said["merge_dim"], said["num_tokens"]
    ours = Ours({"stem": LightStem(3, dim), "merge": MergePatches(dim, out), "mlp": GatedMLP(out, out * said["mlp_ratio"])})
    ours.load_state_dict({authors.rename(k): v for k, v in record.state.items()}, strict=False)
    theirs = Theirs({
        "stem": code.ConvStem(embed_dim=dim),
        "merge": code.ResidualMergePatch(dim, out, n),
        "mlp": code.BiAttnMlp(out, out * said["mlp_ratio"]),
    })  # fmt: skip
    theirs.load_state_dict(record.state, strict=False)
    with torch.no_grad():
        for a, b in zip(ours.eval()(*record.inputs.values()), theirs.eval()(*record.inputs.values()), strict=True):
            if not torch.allclose(a, b, atol=1e-3 * float(b.abs().max())):
                raise SystemExit(f"LightViT's parts say something else than formarium: {(a - b).abs().max():.2g}")
    yield from both("dualtoken_vit's parts of LightViT, batch 8", ours, theirs, torch.randn(8, 3, 224, 224), torch.randn(8, n, dim))
