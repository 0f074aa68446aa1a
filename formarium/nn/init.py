"""Initialisation."""

from __future__ import annotations

from torch import nn


def init_transformer(model: nn.Module, std: float = 0.02) -> None:
    """Linear weights from a truncated normal (cut at +-2, as the DeiT family does), biases 0, LayerNorm 1 and 0."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.LayerNorm) and m.elementwise_affine:
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
