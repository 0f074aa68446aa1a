"""LLM.int8(): github.com/bitsandbytes-foundation/bitsandbytes (functional.py, autograd/_functions.py, nn/modules.py:Linear8bitLt).

A record holds one linear layer in half precision: its codes and scales, the input's, the outlier columns, and the output of a layer in
training mode, which on a CPU quantises its weight alone. Quantised checkpoints in their naming load into our layers as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from formarium.authors import Authors, State
from formarium.methods.llm_int8 import LLMInt8
from formarium.nn.int8 import quantize_rows


def linear(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    threshold = float(header["reference"]["constructor"].get("threshold", 0.0))
    weight, bias = state["weight"], state.get("bias")
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    plain.load_state_dict(state)
    layer: Any = LLMInt8(threshold).apply(nn.Sequential(plain.half()))[0]
    x = next(iter(inputs.values())).half()
    codes, scale, outliers = quantize_rows(x.flatten(0, -2), threshold)
    y = layer.train()(x)
    found = {"y": y, "out": y, "CA": codes, "SCA": scale, "CB": layer.unpack().codes, "SCB": layer.scale}
    out = {k: v.detach().float() for k, v in found.items()}
    return out | {"outlier_cols": torch.empty(0, dtype=torch.int64) if outliers is None else outliers}


authors = Authors(parts={"llm_int8*": linear})
