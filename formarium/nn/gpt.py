"""A small GPT (Radford et al. 2019), with the names that transformers has for its parts, and a view into either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.mlp import between


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.c_attn(x), self.num_heads, 3)
        return self.c_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return between(x, self.c_fc, self.c_proj, "gelu_tanh")


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(dim), Attention(dim, heads), nn.LayerNorm(dim), MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """tokens int64 [batch, length] -> logits float [batch, length, vocabulary]; the output layer shares the embedding."""

    def __init__(self, vocabulary: int, context: int = 64, dim: int = 64, layers: int = 2, heads: int = 4):
        super().__init__()
        self.context = context
        self.wte, self.wpe = nn.Embedding(vocabulary, dim), nn.Embedding(context, dim)
        self.h = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(dim)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02 if isinstance(m, nn.Embedding) else m.weight.shape[1] ** -0.5)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of each next token: logits [batch, length, vocabulary], tokens int64 [batch, length]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def train_gpt(tokens: Tensor, vocabulary: int, *, steps: int = 300, batch: int = 32, lr: float = 3e-3, seed: int = 0, **sizes: int) -> GPT:
    """A GPT trained on one long text, int64 [length], in windows of its context."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(vocabulary, **sizes)
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 20) * max(0.1, 1 - step / steps)
            starts = torch.randint(len(tokens) - model.context, (batch,))
            piece = torch.stack([tokens[s : s + model.context] for s in starts.tolist()])
            loss = next_token_loss(model(piece), piece)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


# a view into one ----------------------------------------------------------------------------------------------------


@dataclass
class Activations:
    """What flowed in one forward, by layer: before, mid: the residual before attention and before the MLP, float [batch, length, dim];
    norm1, norm2: what the norms make of them, without gain and bias; value [batch, length, heads, width]; pattern [batch, heads, length,
    length]; mlp_out [batch, length, dim]. logits [batch, length, vocabulary]."""

    before: list[Tensor] = field(default_factory=list)
    mid: list[Tensor] = field(default_factory=list)
    norm1: list[Tensor] = field(default_factory=list)
    norm2: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    pattern: list[Tensor] = field(default_factory=list)
    mlp_out: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class DecoderView:
    """A pre-norm decoder's parts under one set of names: this module's GPT, or transformers' GPT-2 (GPT2Model, GPT2LMHeadModel)."""

    def __init__(self, model: nn.Module):
        trunk: Any = getattr(model, "transformer", model)
        if reason := self.why_not(model):
            raise BadInput(type(model).__name__, expected="a GPT-2-like decoder", got=reason)
        self.model, self.trunk = model, trunk
        self.blocks = [*trunk.h]
        self.embedding: Tensor = trunk.wte.weight  # [vocabulary, dim]
        self.dim = self.embedding.shape[1]
        self.heads = int(self.blocks[0].attn.num_heads)

    @staticmethod
    def why_not(model: nn.Module) -> str:
        trunk = getattr(model, "transformer", model)
        if not all(hasattr(trunk, name) for name in ("wte", "wpe", "h", "ln_f")):
            return "no wte, wpe, h and ln_f in it"
        if not all(hasattr(b, n) for b in trunk.h for n in ("ln_1", "attn", "ln_2", "mlp")):
            return "blocks without ln_1, attn, ln_2 and mlp"
        return ""

    @torch.no_grad()
    def run(self, tokens: Tensor) -> Activations:
        """One forward of int64 [batch, length] in eval mode; the model's own mode is left as it was."""
        found, raw = Activations(), []
        hooks = []
        for block in self.blocks:
            hooks += [
                block.ln_1.register_forward_pre_hook(lambda m, a: found.before.append(a[0])),
                block.ln_2.register_forward_pre_hook(lambda m, a: found.mid.append(a[0])),
                block.attn.c_attn.register_forward_hook(lambda m, a, out: raw.append(out)),
                block.mlp.register_forward_hook(lambda m, a, out: found.mlp_out.append(out)),
            ]
        was = self.model.training
        try:
            self.model.eval()
            out = self.model(tokens)
        finally:
            self.model.train(was)
            for hook in hooks:
                hook.remove()
        found.logits = self._logits(out)
        for i, block in enumerate(self.blocks):
            found.norm1.append(plain_norm(found.before[i], block.ln_1.eps))
            found.norm2.append(plain_norm(found.mid[i], block.ln_2.eps))
            q, k, v = split_heads(raw[i], self.heads, 3)
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            found.pattern.append(scores.masked_fill(later, float("-inf")).softmax(-1))
            found.value.append(v.transpose(1, 2))
        return found

    def _logits(self, out: Any) -> Tensor:
        if isinstance(out, Tensor):
            return out
        return out.logits if hasattr(out, "logits") else out.last_hidden_state @ self.embedding.T

    def w_o(self, layer: int) -> Tensor:
        """[heads, width, dim]"""
        return self._weight(self.blocks[layer].attn.c_proj).view(self.heads, -1, self.dim)

    def w_v(self, layer: int) -> Tensor:
        """[heads, dim, width], with the gain of the norm before it: what multiplies norm1."""
        weight = self._weight(self.blocks[layer].attn.c_attn)[:, 2 * self.dim :]
        return (self.blocks[layer].ln_1.weight[:, None] * weight).view(self.dim, self.heads, -1).transpose(0, 1)

    @staticmethod
    def _weight(layer: Any) -> Tensor:
        """[in, out], whichever way round it is stored."""
        return layer.weight.detach().T if isinstance(layer, nn.Linear) else layer.weight.detach()

    @contextmanager
    def replaced(self, layer: int, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """The MLP of a layer replaced for a while: fn(norm2 [batch, length, dim]) -> [batch, length, dim]."""
        block, seen = self.blocks[layer], []
        hooks = [
            block.ln_2.register_forward_pre_hook(lambda m, a: seen.append(a[0])),
            block.mlp.register_forward_hook(lambda m, a, out: fn(plain_norm(seen.pop(), block.ln_2.eps))),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def plain_norm(x: Tensor, eps: float) -> Tensor:
    """LayerNorm without gain and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)
