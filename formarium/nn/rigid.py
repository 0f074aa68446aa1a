"""Rigid motions from corresponding points: the least-squares one, and the one that most correspondences agree with."""

from __future__ import annotations

import torch
from torch import Tensor


def fit_motion(source: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The rotation and translation that bring source [..., n, 3] to target with the least weighted squared error (Kabsch, Umeyama).

    weight: [..., n], not negative. Returns [..., 4, 4]; the identity where fewer than one point counts.
    """
    source, target = source.double(), target.double()
    w = torch.ones_like(source[..., 0]) if weight is None else weight.double()
    w = (w / w.sum(-1, keepdim=True).clamp_min(1e-12))[..., None]
    a, b = (w * source).sum(-2, keepdim=True), (w * target).sum(-2, keepdim=True)
    u, _, vt = torch.linalg.svd((w * (source - a)).transpose(-1, -2) @ (target - b))
    sign = torch.linalg.det(u @ vt).sign()
    flip = torch.ones_like(u[..., 0]).clone()
    flip[..., 2] = torch.where(sign == 0, torch.ones_like(sign), sign)
    rotation = (vt.transpose(-1, -2) * flip[..., None, :]) @ u.transpose(-1, -2)
    motion = torch.eye(4, dtype=torch.float64, device=source.device).repeat(*source.shape[:-2], 1, 1)
    motion[..., :3, :3] = rotation
    motion[..., :3, 3] = (b - a @ rotation.transpose(-1, -2))[..., 0, :]
    return motion.float()


def move(motion: Tensor, points: Tensor) -> Tensor:
    """points [..., n, 3] under motion [..., 4, 4]."""
    return points @ motion[..., :3, :3].transpose(-1, -2) + motion[..., None, :3, 3]


def ransac_motion(
    source: Tensor, target: Tensor, radius: float, trials: int = 2000, refine: int = 3, generator: torch.Generator | None = None
) -> Tensor:
    """The motion that brings the most of source [n, 3] within `radius` of target [n, 3]: [4, 4].

    Motions are fitted to random triples (all at once), the best one to its inliers, `refine` times. The identity where n < 3.
    """
    n = len(source)
    if n < 3:
        return torch.eye(4, device=source.device)
    pick = torch.rand(trials, n, generator=generator).topk(3, 1).indices if n <= 64 else torch.randint(n, (trials, 3), generator=generator)
    pick = pick.to(source.device)
    # a rigid motion keeps distances: triples whose sides differ can't be right
    a, b = source[pick], target[pick]
    sides = [(p - p.roll(1, 1)).norm(dim=2) for p in (a, b)]
    fair = ((sides[0] - sides[1]).abs() < 2 * radius).all(1) & (sides[0] > 1e-6).all(1)
    if fair.any():
        a, b = a[fair], b[fair]
    motions = fit_motion(a, b)
    agree = torch.cat([((move(m, source) - target).norm(dim=2) < radius).sum(1) for m in motions.split(max(1, (1 << 22) // n))])
    best = motions[agree.argmax()]
    for _ in range(refine):
        inlier = (move(best, source) - target).norm(dim=1) < radius
        if int(inlier.sum()) < 3:
            break
        best = fit_motion(source[inlier], target[inlier])
    return best


def random_rotations(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Rotations drawn evenly from SO(3): [count, 3, 3]."""
    q = torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1)
    w, x, y, z = q.unbind(1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(r, -1) for r in rows], -2)
