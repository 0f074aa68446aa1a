"""Self-distillation without labels: DINO (Caron et al. 2021) on class tokens, iBOT (Zhou et al. 2022) on masked patches, KoLeo
(Sablayrolles et al. 2019), and what DINOv2 (Oquab et al. 2023, arXiv 2304.07193) trains them by: projection heads, centring or
Sinkhorn-Knopp, block masks, an averaged teacher, schedules.

A student sees several crops of an image, the teacher (its own moving average) the large ones only; the student must say what the teacher
says of another crop, over K learned prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrototypeHead(nn.Module):
    """Linear, GELU, ..., Linear to a bottleneck, L2 normalisation, then prototypes: a linear layer without bias whose rows are
    gain * direction / |direction| (the gain stays 1 in training). x: float [..., dim]. Returns [..., prototypes]."""

    def __init__(
        self, dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256, layers: int = 3, batch_norm: bool = False,
        bias: bool = True, std: float = 0.02,
    ):  # fmt: skip
        super().__init__()
        widths = [dim, *(hidden,) * (max(layers, 1) - 1), bottleneck]
        parts: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            parts.append(nn.Linear(a, b, bias=bias))
            if i < len(widths) - 2:
                parts += [nn.BatchNorm1d(b), nn.GELU()] if batch_norm else [nn.GELU()]
        for m in parts:
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=std)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        self.mlp: nn.Module = nn.Sequential(*parts) if len(parts) > 1 else parts[0]
        self.direction = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(prototypes, bottleneck), a=math.sqrt(5)))
        self.gain = nn.Parameter(torch.ones(prototypes, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.mlp(x), dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        return F.linear(x, self.gain * F.normalize(self.direction, dim=-1))


# what the teacher says ----------------------------------------------------------------------------------------------


@torch.no_grad()
def centred(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """softmax((logits - centre) / temperature) over prototypes. logits: float [rows, K]; centre: broadcasts. The same shape."""
    return ((logits.float() - centre) / temperature).softmax(-1)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Soft assignments of rows to prototypes that use all prototypes alike (Cuturi 2013; Caron et al. 2020). logits: float [rows, K].
    Returns the same shape, rows summing to 1."""
    q = (logits.float() / temperature - (logits.float() / temperature).max()).exp()  # the shift cancels, and nothing overflows
    q = q / q.sum()
    rows, k = q.shape
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True).clamp_min(1e-30) / k
        q = q / q.sum(1, keepdim=True).clamp_min(1e-30) / rows
    return q * rows


@torch.no_grad()
def update_centre(centre: Tensor, logits: Tensor, momentum: float = 0.9) -> None:
    """In place: the moving average of the teacher's mean logits; it serves the next step's targets. logits: float [rows, K]."""
    if len(logits):
        centre.lerp_(logits.float().mean(0).view_as(centre), 1 - momentum)


# the losses ---------------------------------------------------------------------------------------------------------


def distillation(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean cross entropy of the student's logits [..., rows, K] against the teacher's probabilities [rows, K], in nats; summed over leading
    dimensions."""
    loss = -(teacher * F.log_softmax(student.float() / temperature, -1)).sum(-1)
    return loss.mean(-1).sum()


def dino_losses(student_global: Tensor, student_local: Tensor, teacher: Tensor, temperature: float = 0.1) -> tuple[Tensor, Tensor]:
    """(global, local) class token losses; both are divided by the number of pairs of crops, G (G - 1) + G L.

    student_global: [G, images, K] logits; student_local: [L, images, K]; teacher: [G, images, K] probabilities, crop by crop as the
    student's. A global crop is never compared with itself.
    """
    g, local = teacher.shape[0], student_local.shape[0]
    pairs = g * (g - 1) + max(g * local, 1)
    log_global = F.log_softmax(student_global.float() / temperature, -1)
    others = torch.einsum("aik,bik->ab", log_global, teacher) / -teacher.shape[1]
    global_loss = (others.sum() - others.diagonal().sum()) / pairs
    if not local:
        return global_loss, global_loss.new_zeros(())
    log_local = F.log_softmax(student_local.float() / temperature, -1)
    return global_loss, torch.einsum("lik,bik->", log_local, teacher) / -(teacher.shape[1] * pairs)


def ibot_loss(student: Tensor, teacher: Tensor, masks: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross entropy on masked patches only: each image's mean, averaged over all images (those without a mask count as 0).

    student: [masked, K] logits, teacher: [masked, K] probabilities, both in the order of masks.flatten().nonzero(); masks: bool
    [images, patches].
    """
    if not len(student):
        return student.sum()
    weight = (1 / masks.sum(-1).clamp_min(1).float())[:, None].expand(masks.shape)[masks]
    loss = -(teacher * F.log_softmax(student.float() / temperature, -1)).sum(-1)
    return (loss * weight).sum() / masks.shape[0]


def koleo(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Minus the mean log distance to the nearest neighbour among L2-normalised x, float [rows, dim]: spreads them out. 0 for one row."""
    if len(x) < 2:
        return x.float().sum() * 0
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1, eps=eps)
        near = (x @ x.T).detach().fill_diagonal_(-1).argmax(1)
        return -(F.pairwise_distance(x, x[near], 2, eps=eps) + eps).log().mean()


# masks --------------------------------------------------------------------------------------------------------------


def block_mask(
    grid: tuple[int, int], count: int, rng: np.random.Generator, least: int = 4, most: int | None = None, aspect: float = 0.3
) -> np.ndarray:
    """A mask of about `count` patches made of rectangles (BEiT, Bao et al. 2022): bool [h, w], never more than count.

    least, most: patches of a rectangle. aspect: its sides' ratio lies log-uniformly in [aspect, 1 / aspect].
    """
    height, width = grid
    mask, done = np.zeros(grid, dtype=bool), 0
    while done < count:
        room = min(count - done, most if most is not None else count)
        for _ in range(10):
            area, ratio = rng.uniform(min(least, room), max(least, room)), math.exp(rng.uniform(math.log(aspect), -math.log(aspect)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (0 < h < height and 0 < w < width):
                continue
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            window = mask[top : top + h, left : left + w]
            new = h * w - int(window.sum())
            if 0 < new <= room:
                window[:] = True
                done += new
                break
        else:
            break
    return mask


def block_masks(
    images: int, grid: tuple[int, int], rng: np.random.Generator, share: float = 0.5, ratio: tuple[float, float] = (0.1, 0.5)
) -> np.ndarray:
    """Masks for a batch: bool [images, h w]. A share of the images is masked, their ratios spread evenly over `ratio`, in random order."""
    chosen, patches = int(images * share), grid[0] * grid[1]
    edges = np.linspace(*ratio, chosen + 1)
    counts = [int(patches * rng.uniform(edges[i], edges[i + 1])) for i in range(chosen)] + [0] * (images - chosen)
    most = int(0.5 * patches)
    masks = np.stack([block_mask(grid, c, rng, most=most).ravel() for c in counts])
    return masks[rng.permutation(images)]


# schedules ----------------------------------------------------------------------------------------------------------


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """Half a cosine from start (step 0) to end (step `steps`)."""
    return end + (start - end) * (1 + math.cos(math.pi * min(step, steps) / max(1, steps))) / 2


def warm(step: int, warmup: int, start: float, end: float) -> float:
    """Linear from start to end over the warm-up, then end."""
    return end if step >= warmup else start + (end - start) * step / max(1, warmup)


@torch.no_grad()
def average_into(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, in place."""
    torch._foreach_lerp_([*teacher], [s.detach() for s in student], 1 - momentum)
