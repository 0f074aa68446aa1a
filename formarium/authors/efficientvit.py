"""EfficientViT: github.com/microsoft/Cream, EfficientViT/ (classification and downstream)."""

from __future__ import annotations

from typing import Any

from formarium.authors import Authors


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    dense = "downstream" in header["reference"]["entry"]
    return {
        "dims": theirs["embed_dim"],
        "depths": theirs["depth"],
        "heads": theirs["num_heads"],
        "key_dims": theirs.get("key_dim", (16, 16, 16)),
        "windows": theirs.get("window_size", (7, 7, 7)),
        "kernels": theirs.get("kernels", (5, 5, 5, 5)),
        "image_size": theirs.get("img_size", 400 if dense else 224),
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": theirs.get("num_classes", 1000),
        "distillation": theirs.get("distillation", False) and not dense,
        "dense": dense,
    }


_CONV = [("c", "conv"), ("bn", "norm")]
_PARTS = [("pw1", "widen"), ("pw2", "narrow")]


def _conv(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [(f"{theirs}.{t}", f"{ours}.{o}") for t, o in _CONV]


def _local(theirs: tuple[str, str], ours: str) -> list[tuple[str, str]]:
    """A residual depthwise convolution and a residual FFN."""
    return [*_conv(f"{theirs[0]}.m", f"{ours}.0"), *(r for t, o in _PARTS for r in _conv(f"{theirs[1]}.m.{t}", f"{ours}.1.{o}"))]


def _block(theirs: str, ours: str) -> list[tuple[str, str]]:
    attention, mixer = f"{theirs}.mixer.m.attn", f"{ours}.mixer.attention"
    return [
        *_local((f"{theirs}.dw0", f"{theirs}.ffn0"), f"{ours}.before"),
        *_local((f"{theirs}.dw1", f"{theirs}.ffn1"), f"{ours}.after"),
        *_conv(f"{attention}.qkvs.{{k}}", f"{mixer}.qkv.{{k}}"),
        *_conv(f"{attention}.dws.{{k}}", f"{mixer}.local.{{k}}"),
        *_conv(f"{attention}.proj.1", f"{mixer}.out"),
        (f"{attention}.attention_biases", f"{mixer}.biases"),
    ]


def _down(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [
        *_local((f"{theirs}.0.0", f"{theirs}.0.1"), f"{ours}.before"),
        *(r for t, o in [("conv1", "widen"), ("conv2", "stride"), ("conv3", "narrow")] for r in _conv(f"{theirs}.1.{t}", f"{ours}.{o}")),
        (f"{theirs}.1.se.fc1", f"{ours}.squeeze"),
        (f"{theirs}.1.se.fc2", f"{ours}.excite"),
        *_local((f"{theirs}.2.0", f"{theirs}.2.1"), f"{ours}.after"),
    ]


authors = Authors(
    names=[
        *(r for i in range(4) for r in _conv(f"patch_embed.{2 * i}", f"stem.{i}")),
        *_block("blocks1.{j}", "stages.0.blocks.{j}"),
        *(r for i in (1, 2) for r in _down(f"blocks{i + 1}", f"stages.{i}.down")),
        *(r for i in (1, 2) for r in _block(f"blocks{i + 1}.{{j+3}}", f"stages.{i}.blocks.{{j}}")),
        ("head.bn", "head.0"),
        ("head.l", "head.1"),
        ("head_dist.bn", "distilled_head.0"),
        ("head_dist.l", "distilled_head.1"),
    ],
    config=config,
    ignore=["*.attention_bias_idxs", "*.ab"],
)
