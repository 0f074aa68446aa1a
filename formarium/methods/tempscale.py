"""TempScale (Zhou et al., ACL 2025, arXiv 2410.24200): a temperature in the softmax of attention, and no training.

Attention averages tokens, and the longer the text, the stronger: embeddings of long texts lose what tells them apart (length collapse).
Dividing the scores by one temperature tau < 1 sharpens every attention and lets more of the high frequencies through:

    softmax((q k^T / sqrt(d) + bias + mask) / tau)

`LengthCollapse` (beside this file) measures the collapse and what a temperature does to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import nn

from formarium.errors import BadInput
from formarium.method import Method, remember
from formarium.nn.softmax_attention import SoftmaxAttention

CROSS = ("*EncDecAttention*", "*crossattention*", "*cross_attn*", "*encoder_attn*", "*multihead_attn*")  # as common models call it
_ATTENTION = re.compile(r"atten|attn|mha$", re.IGNORECASE)


class TempScale(Method):
    """Divide the scores of every self-attention by `temperature`.

    temperature: more than 0; below 1 sharpens, 1 is the model as it was. The paper takes one from a small grid below 1, by a validation
    task.
    include, exclude: globs over module names. By default every innermost module whose class is named for attention, cross-attention aside;
        name the modules with `include` where a model calls them otherwise.
    """

    def __init__(self, temperature: float = 0.9, include: Sequence[str] = (), exclude: Sequence[str] = CROSS):
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise BadInput("temperature", expected="a number above 0, usually between 0.5 and 1", got=repr(temperature))
        self.temperature, self.include, self.exclude = float(temperature), tuple(include), tuple(exclude)

    def needs(self, model: Any) -> str:
        if attentions(model, self.include, self.exclude):
            return ""
        if self.include:
            return f"no module is called {' or '.join(self.include)}"
        return "none of its modules is named for attention; say which compute it with include="

    def apply(self, model: Any, data: Any = None) -> Any:
        """The same model, changed in place; its weights and the names in its state dict stay as they are, so the temperature isn't
        saved with them (a run directory remembers it). Applied again, the new temperature replaces the old. `data` isn't needed.

        Raises BadInput where there is no attention, or, at the first forward, where a module computes none that can be reached.
        """
        if reason := self.needs(model):
            raise BadInput(f"TempScale on {type(model).__name__}", expected="a model with softmax attention", got=reason)
        for name, module in attentions(model, self.include, self.exclude).items():
            temper(module, self.temperature, name)
        for module in model.modules():  # torch's fused encoder layer would pass its attention by
            if isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.self_attn, Tempered):
                temper(module, self.temperature, "encoder layer")
        remember(model, "tempscale", temperature=self.temperature, include=[*self.include], exclude=[*self.exclude])
        return model

    @staticmethod
    def remove(model: Any) -> Any:
        """The model as it was before any temperature."""
        for module in model.modules():
            if isinstance(module, Tempered):
                module.__class__ = type(module).__bases__[1]
                del module.temperature, module.tempered_name
        if hasattr(model, "changes"):
            model.changes = [c for c in model.changes if c["method"] != "tempscale"]
        return model


def attentions(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = CROSS) -> dict[str, nn.Module]:
    """The modules that compute attention, by name: those that `include` names, or else the innermost ones whose class says so."""
    named = {n: m for n, m in model.named_modules() if not any(fnmatchcase(n, p) for p in exclude)}
    if include:
        return {n: m for n, m in named.items() if any(fnmatchcase(n, p) for p in include)}
    found = {n: m for n, m in named.items() if _says_attention(m)}
    return {n: m for n, m in found.items() if not any(_says_attention(inner) for inner in m.modules() if inner is not m)}


def _says_attention(module: nn.Module) -> bool:
    cls = type(module).__bases__[1] if isinstance(module, Tempered) else type(module)
    return bool(_ATTENTION.search(cls.__name__)) and any(True for _ in module.children())  # one with no layer in it computes no scores


class Tempered:
    """Put before a module's own class: its forward, with a temperature in every softmax attention it calls."""

    temperature: float
    tempered_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attention = SoftmaxAttention(self.temperature)
        with attention:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not torch.compiler.is_compiling() and not attention.seen:
            raise BadInput(
                f"{self.tempered_name} ({type(self).__bases__[1].__name__})",
                expected="softmax or scaled_dot_product_attention inside",
                got="neither",
                fix='load the model with attn_implementation="sdpa" or "eager", or leave the module out with exclude=',
            )
        return out


@cache
def tempered_class(cls: type) -> type:
    """The class whose forward has the temperature; module instances are moved to it, so that isinstance and state dicts hold."""
    return type(f"Tempered{cls.__name__}", (Tempered, cls), {"__module__": cls.__module__})


def temper(module: Any, temperature: float, name: str) -> None:
    """Give one module a temperature, in place."""
    if not isinstance(module, Tempered):
        module.__class__ = tempered_class(type(module))
    module.temperature, module.tempered_name = temperature, name
