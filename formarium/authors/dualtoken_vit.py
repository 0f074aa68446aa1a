"""DualToken-ViT: no public code. The parts it takes over have LightViT's names (github.com/hunto/LightViT, detection/lightvit.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from formarium.authors import Authors, State
from formarium.nn.light import GatedMLP, LightStem, MergePatches

STEM = [
    *[(f"stem.{3 * i}", f"convs.{i}.conv") for i in range(4)],
    *[(f"stem.{3 * i + 1}", f"convs.{i}.norm") for i in range(4)],
    ("proj", "project"),
]
MERGE = [("norm2", "norm_follow"), ("reduction", "reduce"), ("res_proj", "shortcut"), ("proj", "project")]
MLP = [
    ("fc1", "mlp.fc1"),
    ("fc2", "mlp.fc2"),
    ("attn.norm", "gate.norm"),
    ("attn.global_reduce", "gate.mean"),
    ("attn.local_reduce", "gate.own"),
    ("attn.channel_select", "gate.channel"),
    ("attn.spatial_select", "gate.token"),
]


def at(prefix: str, names: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"{prefix}.{theirs}", f"{prefix}.{ours}") for theirs, ours in names]


def parts(header: dict[str, Any], inputs: Mapping[str, Tensor], state: State) -> dict[str, Tensor]:
    """LightViT's stem, merging (of image and global tokens), and gated feed-forward network, one after the other."""
    said = header["reference"]["constructor"]
    dim, out = said["stem_dim"], said["merge_dim"]
    stem, merge = LightStem(said.get("in_chans", 3), dim), MergePatches(dim, out)
    mlp = GatedMLP(out, int(out * said.get("mlp_ratio", 4)))
    whole = nn.ModuleDict({"stem": stem, "merge": merge, "mlp": mlp}).eval()
    found = whole.load_state_dict({authors.rename(k): v for k, v in state.items()}, strict=False)
    wrong = [*found.unexpected_keys, *(k for k in found.missing_keys if not k.endswith("num_batches_tracked"))]
    if wrong:
        raise KeyError(", ".join(wrong))
    _, x, grid = stem(inputs["x"])
    merged, _ = merge(x, grid)
    return {"stem": x, "merged_global": merge.follow(inputs["g"]), "merged_image": merged, "bidim_mlp": mlp(merged)}


authors = Authors(
    names=[
        *at("stem", STEM),
        *at("merge", MERGE),
        *at("mlp", MLP),
        *at("stages.{i}.merge", MERGE),
        *at("stages.{i}.blocks.{j}.mlp", MLP),
    ],
    parts={"*parts*": parts},
)
