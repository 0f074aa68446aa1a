"""TempScale beside github.com/Yuqi-Zhou/Length_Collapse: an attention layer of transformers' BERT and T5, with a temperature by either."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formarium.methods.tempscale import TempScale
from references import Pair, both, importing

REPOSITORY = "Yuqi-Zhou/Length_Collapse"


class First(nn.Module):
    """An attention layer's output alone."""

    def __init__(self, layer: nn.Module, *more: Any):
        super().__init__()
        self.layer, self.more = layer, more

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, *self.more)[0]


def pairs(clone: Path) -> Iterator[Pair]:
    from transformers import AutoConfig, BertConfig, T5Config  # noqa: F401 (the clone imports the first)
    from transformers.models.bert.modeling_bert import BertSelfAttention
    from transformers.models.t5.modeling_t5 import T5Attention as PlainT5

    with importing(clone / "src", sentence_transformers={"SentenceTransformer": object}):
        import model as theirs
    torch.manual_seed(0)
    bert = BertSelfAttention(BertConfig(attn_implementation="sdpa", attention_probs_dropout_prob=0.0))
    t5 = PlainT5(
        T5Config(attn_implementation="sdpa", d_model=768, d_kv=64, num_heads=12, dropout_rate=0.0), has_relative_attention_bias=True
    )
    x = torch.randn(4, 512, 768)
    for name, plain, wrap in (("BERT-base's", bert, theirs.BertAttention), ("T5-base's", t5, theirs.T5Attention)):
        own = TempScale(0.8, include=("",)).apply(copy.deepcopy(plain))
        pair = First(own), First(wrap(as_it_was(plain), 0.8))
        with torch.no_grad():
            a, b = (m.eval()(x[:1]) for m in pair)
        if not torch.allclose(a, b, atol=1e-4 * float(b.abs().max())):
            raise SystemExit(f"{name} attention says something else than formarium's: {(a - b).abs().max():.2g}")
        yield from both(f"{name} attention, 4 texts of 512 tokens", *pair, x)


def as_it_was(layer: Any) -> Any:
    """With what transformers' attention had when the authors wrapped it."""
    if hasattr(layer, "query"):
        heads, width = layer.num_attention_heads, layer.attention_head_size
        layer.transpose_for_scores = lambda x: x.view(*x.shape[:-1], heads, width).permute(0, 2, 1, 3)
        layer.position_embedding_type = "absolute"
    else:
        layer.pruned_heads = set()
    return layer
