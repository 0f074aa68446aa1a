"""LLM.int8() beside bitsandbytes (the authors' library, as installed): linear layers, and an encoder with all of its MLPs in 8 bits.
One row is beside torch's dynamic quantisation: one scale for all tokens, 7 bits, no outliers.

bitsandbytes quantises the same float weights, inputs row by row and outliers from 6.0 on apart as here; it rounds inputs to float16 first.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from formarium.methods.llm_int8 import LLMInt8
from references import Pair, both

PEER, NEEDS = "bitsandbytes", ("bitsandbytes",)
WIDTH, HIDDEN, LAYERS = 768, 3072, 4  # of a base encoder
MLPS = ("*linear1", "*linear2")


def pairs(clones: Path) -> Iterator[Pair]:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every call that float32 inputs are rounded to float16
    torch.manual_seed(0)
    for tokens in (1, 16, 128, 512):
        x = torch.randn(tokens, WIDTH)
        x[:, 7] *= 20  # a feature with outliers
        layers = [part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH))]
        yield from _pair(f"{2 * LAYERS} layers, {WIDTH} and {HIDDEN} wide, {tokens} tokens", nn.Sequential(*layers), x)
    layer = nn.TransformerEncoderLayer(WIDTH, 12, HIDDEN, activation="gelu", batch_first=True)
    for tokens in (16, 128, 512):
        encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        yield from _pair(f"encoder, {LAYERS} layers, {tokens} tokens", encoder, torch.randn(1, tokens, WIDTH))
    ours = LLMInt8(include=MLPS).apply(deepcopy(encoder).eval())
    yield from both("encoder, 128 tokens, beside torch.ao", ours, _dynamic(encoder.eval()), torch.randn(1, 128, WIDTH), modes=("forward",))


def _pair(name: str, model: nn.Module, x: torch.Tensor) -> Iterator[Pair]:
    """The same layers in both: MLPs of a transformer, or what a sequence holds."""
    ours = LLMInt8(include=MLPS if isinstance(model, nn.TransformerEncoder) else ("*",)).apply(deepcopy(model).eval())
    theirs = _theirs(deepcopy(model).eval())
    with torch.inference_mode():
        a, b = ours(x), theirs(x)
    if (a - b).norm() > 0.05 * b.norm():  # a code here and there is another after rounding to float16
        raise SystemExit(f"bitsandbytes says something else than formarium: {(a - b).norm() / b.norm():.2g}")
    yield from both(name, ours, theirs, x, modes=("forward",))


def _theirs(model: nn.Module) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    for name, old in list(model.named_modules()):
        if isinstance(old, nn.TransformerEncoderLayer):
            old.activation_relu_or_gelu = 0  # torch's fused layer would pass these by
        if not isinstance(old, nn.Linear) or name.endswith("out_proj"):
            continue
        new = Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False, threshold=6.0)
        new.load_state_dict(old.state_dict())
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.to("cpu").eval())
    return model


def _dynamic(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is to become a package of its own
        for layer in model.layers:
            for name in ("linear1", "linear2"):
                setattr(layer, name, torch.ao.quantization.quantize_dynamic(nn.Sequential(getattr(layer, name)), {nn.Linear})[0])
            layer.activation_relu_or_gelu = 0
    return model
