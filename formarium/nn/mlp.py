"""The position-wise feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn

from formarium.nn.ops.activations import activate
from formarium.nn.ops.feed_forward import feed_forward


class MLP(nn.Module):
    """Linear, GELU, Linear. x: float [..., dim]. Returns [..., out] (out = dim by default)."""

    def __init__(self, dim: int, hidden: int, out: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return between(x, self.fc1, self.fc2)


def between(x: Tensor, fc1: nn.Module, fc2: nn.Module, activation: str = "gelu") -> Tensor:
    """fc2(activation(fc1(x))) with "gelu", "gelu_tanh" or "silu", fast where both are plain linear layers (a method may have put others
    in their place: int8, adapters)."""
    if type(fc1) is nn.Linear and type(fc2) is nn.Linear:
        return feed_forward(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation)
    return fc2(activate(fc1(x), activation))


def activated(x: Tensor, fc: nn.Module, activation: str = "gelu") -> Tensor:
    """activation(fc(x)), in the product's own memory where fc is a plain linear layer and no gradient is wanted."""
    if type(fc) is nn.Linear:
        return activate(nn.functional.linear(x, fc.weight, fc.bias), activation, own=True)
    return activate(fc(x), activation)
