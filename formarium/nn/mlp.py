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
        if type(self.fc1) is nn.Linear and type(self.fc2) is nn.Linear:
            return feed_forward(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return self.fc2(nn.functional.gelu(self.fc1(x)))  # a method has put another layer in place (int8, adapters)
