"""Reaching every softmax attention in a block of code, whoever wrote it: rescale its scores, read its probabilities.

Whatever an attention layer looks like, it ends in one of a few calls: a softmax, `scaled_dot_product_attention`, or torch's own
multi-head layer. `SoftmaxAttention` is a context in which those calls are seen; everything else runs as it always does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from formarium.nn.attention import biased_attention

Watch = Callable[[Tensor, Tensor | None], None]
_SOFTMAXES = {torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax}


class SoftmaxAttention(TorchFunctionMode):
    """Within it, attention is softmax((q k^T s + bias + mask) / temperature).

    watch: is called with each attention's probabilities [batch, heads, queries, keys] and its values [batch, heads, keys, width] (None
    where they can't be seen). `seen` counts the attentions. At temperature 1 and unwatched every call goes through untouched.
    """

    def __init__(self, temperature: float = 1.0, watch: Watch | None = None):
        super().__init__()
        self.temperature, self.watch, self.seen = temperature, watch, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SOFTMAXES:
            return self._softmax(func, *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._layer(*args, **kwargs)
        return func(*args, **kwargs)

    def _softmax(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen += 1
        if self.temperature != 1:
            dim = kwargs.get("dim", args[0] if args else -1)
            input = sharpen(input, self.temperature, dim)
        probabilities = func(input, *args, **kwargs)
        if self.watch is not None:
            self.watch(probabilities.detach(), None)
        return probabilities

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **rest: Any,
    ) -> Tensor:
        self.seen += 1
        if self.temperature != 1:
            scale = (query.shape[-1] ** -0.5 if scale is None else scale) / self.temperature
            attn_mask = sharpen_mask(attn_mask, self.temperature)
        if self.watch is not None:
            self.watch(probabilities(query, key, attn_mask, is_causal, scale).detach(), value.detach())
        learned = (
            attn_mask is not None and attn_mask.requires_grad and not (dropout_p or is_causal or rest or torch.compiler.is_compiling())
        )
        if attn_mask is not None and learned and not attn_mask.isneginf().any():  # where whole rows are masked the fused operator gives 0
            return biased_attention(query, key, value, attn_mask, scale)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **rest)

    def _layer(self, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *args: Any, **kwargs: Any) -> Any:
        """torch's multi-head layer: its scores are linear in the query's projection, so that is what the temperature divides."""
        self.seen += 1
        names = ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias")
        kwargs = {**dict(zip(names, args, strict=True)), **kwargs}
        if self.temperature != 1:
            for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight"):  # the first third of a fused projection is the query's
                kwargs[name] = _divide_first(kwargs.get(name), width, self.temperature)
            for name in ("attn_mask", "key_padding_mask"):
                kwargs[name] = sharpen_mask(kwargs.get(name), self.temperature)
        if self.watch is None:
            return F.multi_head_attention_forward(query, key, value, width, heads, **kwargs)
        asked, averaged = kwargs.pop("need_weights", True), kwargs.pop("average_attn_weights", True)
        causal = kwargs.pop("is_causal", False) and kwargs.get("attn_mask") is None  # a hint only, where a mask is given as well
        out, weights = F.multi_head_attention_forward(
            query, key, value, width, heads, **kwargs, need_weights=True, average_attn_weights=False, is_causal=causal
        )
        self.watch((weights if weights.ndim == 4 else weights[None]).detach(), None)
        return out, ((weights.mean(-3) if averaged else weights) if asked else None)


def sharpen(scores: Tensor, temperature: float, dim: int = -1) -> Tensor:
    """scores / temperature up to a constant a row, which the softmax over `dim` doesn't see; a row whose keys are all masked with the
    smallest finite number stays finite."""
    return (scores - scores.amax(dim, keepdim=True).detach()).div_(temperature)


def sharpen_mask(mask: Tensor | None, temperature: float) -> Tensor | None:
    """An additive mask or bias divided by the temperature, and still finite where it was; a boolean one stays as it is."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    divided = mask / temperature
    if temperature >= 1:  # nothing overflows
        return divided
    lost = divided.detach().isneginf() & ~mask.detach().isneginf()
    if not torch.compiler.is_compiling() and not lost.any():
        return divided
    return divided.masked_fill(lost, torch.finfo(mask.dtype).min)


def probabilities(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """What `scaled_dot_product_attention` multiplies the values with: float [batch, heads, queries, keys]."""
    if key.ndim > 2 and key.shape[-3] != query.shape[-3]:  # grouped queries share a key
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril().logical_not(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def _divide_first(x: Tensor | None, rows: int, by: float) -> Tensor | None:
    return None if x is None else torch.cat([x[:rows] / by, x[rows:]])
