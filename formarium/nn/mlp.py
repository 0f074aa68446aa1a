"""The position-wise feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn

from formarium.nn.ops.feed_forward import feed_forward


class MLP(nn.Module):
    """Linear, GELU, Linear. x: float [..., dim]. Returns [..., out] (out = dim by default)."""

    def __init__(self, dim: int, hidden: int, out: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_between(x, self.fc1, self.fc2)


def gelu_between(x: Tensor, fc1: nn.Module, fc2: nn.Module, approximate: str = "none") -> Tensor:
    """fc2(gelu(fc1(x))), fast where both are plain linear layers (a method may have put others in their place: int8, adapters)."""
    if type(fc1) is nn.Linear and type(fc2) is nn.Linear:
        return feed_forward(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, approximate)
    return fc2(nn.functional.gelu(fc1(x), approximate=approximate))
