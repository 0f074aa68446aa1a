"""TempScale: github.com/Yuqi-Zhou/Length_Collapse (src/model.py), which wraps single attention modules of BERT and T5; no weights of its
own.

A record holds one such module. Here a plain attention with the same weights is built, and the method applied to it as to any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from formarium.authors import Authors, State
from formarium.methods.tempscale import TempScale

Inputs = Mapping[str, Tensor]


class BertAttention(nn.Module):
    """BERT's and RoBERTa's self-attention, with the relative keys that some of them have. x: float [batch, tokens, dim]."""

    def __init__(self, dim: int, heads: int, positions: str = "absolute", longest: int = 512, scale: float | None = None):
        super().__init__()
        self.heads, self.positions, self.longest, self.scale = heads, positions, longest, scale
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        if positions != "absolute":
            self.distance_embedding = nn.Embedding(2 * longest - 1, dim // heads)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-2, -1)
        if self.positions != "absolute":
            place = torch.arange(x.shape[1])
            near = self.distance_embedding(place[:, None] - place[None, :] + self.longest - 1)
            scores = scores + torch.einsum("bhld,lrd->bhlr", q, near)
            if self.positions == "relative_key_query":
                scores = scores + torch.einsum("bhrd,lrd->bhlr", k, near)
        scores = scores / math.sqrt(q.shape[-1])
        attention = (scores if mask is None else scores + mask).softmax(-1)
        return (attention @ v).transpose(1, 2).flatten(2), attention


class T5Attention(nn.Module):
    """T5's self-attention: no 1/sqrt(d), a learned bias for each bucket of distances. x: float [batch, tokens, dim]."""

    def __init__(self, dim: int, heads: int, width: int, buckets: int, max_distance: int, causal: bool = False, biased: bool = True):
        super().__init__()
        self.heads, self.buckets, self.max_distance, self.causal = heads, buckets, max_distance, causal
        self.q, self.k, self.v = (nn.Linear(dim, heads * width, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * width, dim, bias=False)
        self.relative_attention_bias = nn.Embedding(buckets, heads) if biased else None

    def forward(self, x: Tensor, mask: Tensor | None = None, position_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1)
        if position_bias is not None:
            scores = scores + position_bias
        else:
            if self.relative_attention_bias is not None:
                scores = scores + self.relative_attention_bias(self.bucket(x.shape[1])).permute(2, 0, 1)
            if mask is not None:
                scores = scores + mask
        attention = scores.softmax(-1)
        return self.o((attention @ v).transpose(1, 2).flatten(2)), attention

    def bucket(self, tokens: int) -> Tensor:
        """The bucket of each pair of places: one a distance for small ones, then logarithmically wider up to max_distance."""
        place = torch.arange(tokens)
        distance = place[None, :] - place[:, None]  # key minus query
        if self.causal:
            buckets, first, distance = self.buckets, 0, (-distance).clamp(min=0)
        else:
            buckets, first, distance = self.buckets // 2, (distance > 0) * (self.buckets // 2), distance.abs()
        exact = buckets // 2
        far = exact + ((distance.float() / exact).log() / math.log(self.max_distance / exact) * (buckets - exact)).long()
        return first + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


def bert(header: dict[str, Any], inputs: Inputs, state: State) -> dict[str, Tensor]:
    """BertAttention: context and probabilities."""
    said, own = _said(header), _own(state)
    dim = own["query.weight"].shape[0]
    table = own.get("distance_embedding.weight")
    kind = str(said.get("position_embedding_type", "absolute" if table is None else "relative_key"))
    heads = int(_first(said, "heads", "num_heads", "num_attention_heads", default=12))
    module = BertAttention(dim, heads, kind, (len(table) + 1) // 2 if table is not None else 512)
    module.load_state_dict(own)
    out, attention = _tempered(module, said)(_first(inputs, "x", "hidden_states"), _first(inputs, "mask", "attention_mask"))
    return _outputs(out, attention)


def t5(header: dict[str, Any], inputs: Inputs, state: State) -> dict[str, Tensor]:
    """T5Attention: output and probabilities."""
    said, own = _said(header), _own(state)
    table = own.get("relative_attention_bias.weight")
    inner, dim = own["q.weight"].shape
    heads = int(_first(said, "heads", "num_heads", default=None) or (table.shape[1] if table is not None else inner // int(said["d_kv"])))
    buckets = table.shape[0] if table is not None else 32
    distance = int(_first(said, "max_distance", "relative_attention_max_distance", default=128))
    causal = bool(_first(said, "is_decoder", "causal", default=False))
    module = T5Attention(dim, heads, inner // heads, buckets, distance, causal, table is not None)
    module.load_state_dict(own)
    x, mask, bias = _first(inputs, "x", "hidden_states"), _first(inputs, "mask", "attention_mask"), inputs.get("position_bias")
    out, attention = _tempered(module, said)(x, mask, bias)
    return _outputs(out, attention)


def record(header: dict[str, Any], inputs: Inputs, state: State) -> Any:
    """Which of the two a record holds, its weights' names say."""
    return t5(header, inputs, state) if any(k.endswith("q.weight") for k in state) else bert(header, inputs, state)


def _outputs(out: Tensor, attention: Tensor) -> dict[str, Tensor]:
    """Under every name that a record may have for them."""
    return {**dict.fromkeys(("0", "out", "context"), out), **dict.fromkeys(("1", "attention", "probs"), attention)}


def _tempered(module: nn.Module, said: Mapping[str, Any]) -> nn.Module:
    return TempScale(float(_first(said, "temperature", "tau", default=1.0)), include=("",)).apply(module.eval())


def _said(header: dict[str, Any]) -> dict[str, Any]:
    return dict(header["reference"]["constructor"])


def _own(state: State) -> State:
    """Their wrapper lists the wrapped module's weights twice."""
    prefix = "original_self_attention."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or dict(state)


def _first(values: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    return next((values[n] for n in names if n in values), default)


authors = Authors(parts={"tempscale*": record})
