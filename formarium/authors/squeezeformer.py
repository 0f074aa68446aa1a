"""Squeezeformer: github.com/kssteven418/Squeezeformer (src/models/conformer.py, Keras).

Weights lie as Keras has them: dense [in, out], convolutions [height, width, in, out], attention's [heads, ...]. Its query, key and value
are layers that Keras numbers through (dense_50 ...), in that order; the U-Net's recovery has the lowest numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, State
from formarium.errors import BadInput

E = "encoder"


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    t = {re.sub("^encoder_", "", k): v for k, v in theirs.items()}
    if t.get("mha_type", "relmha") != "relmha":
        raise BadInput("mha_type", expected="relmha", got=t["mha_type"], fix="the other kind can't add its positions to its frames")
    if t["dmodel"] != t["num_heads"] * t["head_size"]:
        raise BadInput("dmodel", expected="num_heads * head_size", got=str(t["dmodel"]))
    arch = t.get("fixed_arch") or ["m", "f", "c", "f"]
    layout = tuple("".join(a) for a in arch) if isinstance(arch[0], (list, tuple)) else "".join(arch)
    return {
        "dim": t["dmodel"],
        "blocks": t["num_blocks"],
        "heads": t["num_heads"],
        "kernel": t.get("kernel_size", 31),
        "layout": layout,
        "reduce_at": tuple(t.get("time_reduce_idx") or ()),
        "recover_at": tuple(t.get("time_recover_idx") or ()) if t.get("time_reduce_idx") else (),
        "filters": t["subsampling"]["filters"],
        "ff_factor": t.get("fc_factor", 0.5),
        "glu": bool(t.get("conv_use_glu")),
        "separable": bool(t.get("ds_subsample", False)),
        "adaptive_scale": bool(t.get("adaptive_scale", False)),
        "block_norm": not t.get("no_post_ln", False),
        "dropout": t.get("dropout", 0.0),
        "mels": 80,
        "exact_padding": False,
        "vocabulary_size": t["vocabulary_size"],
        "vocabulary": (),
    }


def _kernel(w: Tensor) -> Tensor:
    return w.permute(3, 2, 0, 1)  # [height, width, in, out] -> [out, in, height, width]


def _kernel_back(w: Tensor) -> Tensor:
    return w.permute(2, 3, 1, 0)


def _depthwise(w: Tensor) -> Tensor:
    return w.permute(2, 3, 0, 1)


def _over_time(w: Tensor) -> Tensor:
    return w.permute(2, 3, 0, 1).squeeze(-1)  # [k, 1, channels, 1] -> [channels, 1, k]


def _dense(w: Tensor) -> Tensor:
    return w.reshape(w.shape[-2:]).T


FROM = {
    "same": lambda w: w,
    "dense": _dense,
    "kernel": _kernel,
    "depthwise": _depthwise,
    "time": _over_time,
    "position": lambda w: w.permute(0, 2, 1).flatten(0, 1),  # [heads, dim, width] -> [heads width, dim]
    "projection": lambda w: w.flatten(0, 1).T,  # [heads, width, dim] -> [dim, heads width]
}
BACK = {
    "same": lambda w, heads: w,
    "dense": lambda w, heads: w.T,
    "pointwise": lambda w, heads: w.T[None, None],
    "head": lambda w, heads: w.T[None],
    "kernel": lambda w, heads: _kernel_back(w),
    "depthwise": lambda w, heads: w.permute(2, 3, 0, 1),
    "time": lambda w, heads: w[..., None].permute(2, 3, 0, 1),
    "position": lambda w, heads: w.unflatten(0, (heads, -1)).permute(0, 2, 1),
    "projection": lambda w, heads: w.T.unflatten(0, (heads, -1)),
}
FROM |= {"pointwise": _dense, "head": _dense}
Rule = tuple[str, str, str]  # their name, ours, how the weight lies


def _pair(theirs: str, ours: str, kind: str, weight: str = "kernel") -> Iterator[Rule]:
    yield f"{theirs}.{weight}", f"{ours}.weight", kind
    yield f"{theirs}.bias", f"{ours}.bias", "same"


def _norm(theirs: str, ours: str) -> Iterator[Rule]:
    yield f"{theirs}.gamma", f"{ours}.weight", "same"
    yield f"{theirs}.beta", f"{ours}.bias", "same"


def _front(raw: str, path: str, ours: str, adaptive: bool) -> Iterator[Rule]:
    if adaptive:
        yield f"{raw}_scale", f"{ours}.front.weight", "same"
        yield f"{raw}_bias", f"{ours}.front.bias", "same"
    else:
        yield from _norm(f"{path}.{raw}_ln", f"{ours}.front")


def _module(letter: str, raw: str, path: str, ours: str, adaptive: bool) -> Iterator[Rule]:
    """One module: `raw` is its layer's own name, `path` where it lies."""
    if letter in "MC":
        first = "mhsa" if letter == "M" else "conv"
        yield from _module(letter.lower(), f"{raw}_{first}", f"{path}.{raw}_{first}", f"{ours}.first", adaptive)
        yield from _norm(f"{path}.{raw}_ln_mid", f"{ours}.middle")
        yield from _module("f", f"{raw}_ff", f"{path}.{raw}_ff", f"{ours}.feed_forward", adaptive)
        yield from _norm(f"{path}.{raw}_ln", f"{ours}.norm")
        return
    yield from _front(raw, path, ours, adaptive)
    if letter == "f":
        yield from _pair(f"{path}.{raw}_dense_1", f"{ours}.expand", "dense")
        yield from _pair(f"{path}.{raw}_dense_2", f"{ours}.contract", "dense")
    elif letter == "c":
        yield from _pair(f"{path}.{raw}_pw_conv_1", f"{ours}.expand", "pointwise")
        yield from _pair(f"{path}.{raw}_dw_conv", f"{ours}.depthwise", "time", "depthwise_kernel")
        yield from _norm(f"{path}.{raw}_bn", f"{ours}.norm")
        for which in ("running_mean", "running_var"):
            yield f"{path}.{raw}_bn.{which}", f"{ours}.norm.{which}", "same"
        yield from _pair(f"{path}.{raw}_pw_conv_2", f"{ours}.contract", "pointwise")
    elif letter == "m":
        inner = f"{path}.{raw}_mhsa"
        yield f"{inner}.pos_kernel", f"{ours}.position.weight", "position"
        yield f"{inner}.pos_bias_u", f"{ours}.u", "same"
        yield f"{inner}.pos_bias_v", f"{ours}.v", "same"
        yield f"{inner}.projection_kernel", f"{ours}.out.weight", "projection"
        yield f"{inner}.projection_bias", f"{ours}.out.bias", "same"
        for which in range(3):
            yield f"{inner}.DENSE{which}.kernel", f"{ours}.qkv.{which}.weight", "dense"
            yield f"{inner}.DENSE{which}.bias", f"{ours}.qkv.{which}.bias", "same"


def rules(model: Any) -> Iterator[Rule]:
    """Every tensor: their name, ours (a fused projection's thirds as qkv.0 to qkv.2), how it lies. DENSE and a digit stand for a layer
    that Keras numbered: the digit says which of its parent's."""
    c = model.config
    sub = f"{E}.{E}_subsampling.{E}_subsampling"
    yield from _pair(f"{sub}_1", "subsampling.first", "kernel")
    if c.separable:
        yield from _pair(f"{sub}_2_dw", "subsampling.depthwise", "depthwise", "depthwise_kernel")
        yield from _pair(f"{sub}_2_pw", "subsampling.pointwise", "kernel")
    else:
        yield from _pair(f"{sub}_2", "subsampling.second", "kernel")
    yield from _norm(f"{E}.{E}_preln", "norm")
    yield from _pair(f"{E}.{E}_linear", "subsampling.project", "dense")
    for i, block in enumerate(model.blocks):
        path = f"{E}.{E}_block_{i}"
        for j, letter in enumerate(block.layout):
            if letter != "s":
                raw = f"{E}_block_{i}_layer{j + 1}"
                yield from _module(letter, raw, f"{path}.{raw}", f"blocks.{i}.parts.{j}", c.adaptive_scale)
        if c.block_norm:
            yield from _norm(f"{path}.{E}_block_{i}_ln", f"blocks.{i}.norm")
    for i in range(len(c.reduce_at)):
        name = f"{E}_timereduce" + (f"_{i}" if i else "")
        yield from _pair(f"{E}.{name}.{name}_dw_conv", f"reductions.{i}.depthwise", "time", "depthwise_kernel")
        yield from _pair(f"{E}.{name}.{name}_pw_conv_2", f"reductions.{i}.pointwise", "pointwise")
    for i in range(len(c.recover_at)):
        yield from _pair(f"{E}.DENSE{i}", f"recoveries.{i}", "dense")
    yield from _pair("logits", "head", "head")


_NUMBERED = re.compile(r"^(.*)\.dense(?:_(\d+))?\.(kernel|bias)$")


def to_ours(state: State, model: Any) -> State:
    plain = {re.sub(r"\bconformer_", "", k): v for k, v in state.items()}
    numbers: dict[str, set[int]] = {}
    for name in plain:
        if m := _NUMBERED.match(name):
            numbers.setdefault(m[1], set()).add(int(m[2] or 0))
    named: State = {}
    for name, w in plain.items():
        if m := _NUMBERED.match(name):
            name = f"{m[1]}.DENSE{sorted(numbers[m[1]]).index(int(m[2] or 0))}.{m[3]}"
        named[name] = w
    out: State = {}
    for theirs, ours, kind in rules(model):
        if theirs in named:
            out[ours] = FROM[kind](named.pop(theirs)).contiguous()
    for first in [k for k in out if ".qkv.0." in k]:
        parts = [out.pop(first.replace(".qkv.0.", f".qkv.{i}."), None) for i in range(3)]
        if all(p is not None for p in parts):
            out[first.replace(".qkv.0.", ".qkv.")] = torch.cat(parts)  # type: ignore[arg-type]
    return out | named  # what no rule knows stays, and is reported


def to_theirs(state: State, model: Any) -> State:
    c, count = model.config, len(model.config.recover_at)
    found: State = {}
    order: dict[str, int] = {}  # their attention -> the number of its query
    for theirs, ours, kind in rules(model):
        if m := re.match(r"^(.*)\.qkv\.([012])\.(weight|bias)$", ours):
            w = state[f"{m[1]}.qkv.{m[3]}"].chunk(3)[int(m[2])]
            parent = theirs.split(".DENSE")[0]
            number = count + 3 * order.setdefault(parent, len(order)) + int(m[2])
        else:
            w = state[ours]
            number = int(theirs.split("DENSE")[1].split(".")[0]) if "DENSE" in theirs else -1
        name = re.sub(r"DENSE\d+", f"dense_{number}" if number else "dense", theirs)
        found[name] = BACK[kind](w, c.heads).contiguous()
    return found


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    encoded = model.encode(inputs["x"].squeeze(-1), inputs["length"])
    return {"encoded": encoded, "logits": model.head(encoded)}


authors = Authors(config=config, call=call, to_ours=to_ours, to_theirs=to_theirs)
