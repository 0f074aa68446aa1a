"""What every registration model shares: the batch it takes, its prediction, its checks.

A batch holds
    source          float32 [batch, n, 3], metres; zeros behind the last point
    source_normals  float32 [batch, n, 3], unit vectors that all point out of the same side; zeros behind the last point
    source_count    int64 [batch], how many of the n are points
    target, target_normals, target_count    the same of the other cloud, [batch, m, 3]
    transform       float32 [batch, 4, 4], the rigid motion that brings source onto target         (training and evaluation)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Model, check_tensor
from formarium.nn.rigid import move, random_rotations

KEYS = ("source", "source_normals", "source_count", "target", "target_normals", "target_count")


class Registered(NamedTuple):
    """transform: float32 [batch, 4, 4], source onto target. The correspondences, one entry a pair: source, target float32 [c, 3], points
    that belong together, each in its own frame; scores float32 [c]."""

    transform: Tensor
    source: list[Tensor]
    target: list[Tensor]
    scores: list[Tensor]


class RegistrationModel(Model):
    """`forward` takes the six tensors of KEYS. Subclasses say how few points they can work with."""

    task = "point-cloud-registration"
    channel_axes = (2, 2, None, 2, 2, None)
    least_points: int = 4

    def forward_batch(self, batch: Batch) -> Any:
        return self(*(batch[k] for k in KEYS))

    def check_input(self, *inputs: Any) -> None:
        if len(inputs) != len(KEYS):
            raise BadInput("inputs", expected=", ".join(KEYS), got=f"{len(inputs)} of them")
        batch = None
        for name, points, normals, count in (("source", *inputs[:3]), ("target", *inputs[3:])):
            check_tensor(name, points, "batch points 3", sizes={2: 3, **({0: batch} if batch is not None else {})})
            batch = len(points)
            check_tensor(f"{name}_normals", normals, "batch points 3", sizes={0: batch, 1: points.shape[1], 2: 3})
            check_tensor(f"{name}_count", count, "batch", sizes={0: batch}, dtype=lambda d: d in (torch.int64, torch.int32))
            if count.device.type != "cpu":  # a look would stall it
                continue
            least, most = int(count.min()), int(count.max())
            if most > points.shape[1]:
                raise BadInput(f"{name}_count", expected=f"at most {points.shape[1]}", got=str(most))
            if least < self.least_points:
                fix = "give denser clouds, or take a smaller voxel"
                raise BadInput(name, expected=f"at least {self.least_points} points in every cloud", got=str(least), fix=fix)

    @property
    def example_points(self) -> int:
        return 3 * self.least_points

    def example(self, batch: int = 1, points: int | None = None) -> tuple[Tensor, ...]:
        made = self._pairs(batch, points or self.example_points, 0)
        return tuple(made[k].to(self.device) for k in KEYS)

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        return {f"{n} points": self.example(1, n) for n in (self.least_points // 2, self.least_points, 5 * self.least_points + 7)}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        made = {k: v.to(self.device) for k, v in self._pairs(batch, self.example_points, seed).items()}
        return {**made, "id": [f"example {i}" for i in range(batch)]}

    def _pairs(self, batch: int, n: int, seed: int) -> dict[str, Tensor]:
        """Two samplings of an ellipsoid with unequal axes, one of them moved, of slightly different numbers of points."""
        g = torch.Generator().manual_seed(seed)
        axes = torch.tensor([0.5, 0.35, 0.25]) * (0.8 + 0.4 * torch.rand(batch, 1, 3, generator=g))
        on_sphere = torch.nn.functional.normalize(torch.randn(batch, 2 * n, 3, generator=g), dim=2)
        on_sphere[:, n : n + n // 2] = on_sphere[:, : n // 2]  # half of the points are in both
        points, normals = on_sphere * axes, torch.nn.functional.normalize(on_sphere / axes, dim=2)
        motion = torch.eye(4).repeat(batch, 1, 1)
        motion[:, :3, :3] = random_rotations(batch, g)
        motion[:, :3, 3] = torch.randn(batch, 3, generator=g)
        count = n - torch.arange(batch) % 3 * (n // 12)
        mask = (torch.arange(n) < count[:, None])[..., None]
        rotation = motion[:, :3, :3].transpose(1, 2)
        return {
            "source": points[:, :n] * mask,
            "source_normals": normals[:, :n] * mask,
            "source_count": count,
            "target": move(motion, points[:, n:]),
            "target_normals": normals[:, n:] @ rotation,
            "target_count": torch.full((batch,), n),
            "transform": motion,
        }
