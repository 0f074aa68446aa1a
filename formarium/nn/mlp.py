"""The position-wise feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, GELU, Linear. x: float [..., dim]. Returns [..., dim]."""

    def __init__(self, dim: int, hidden: int, out: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
