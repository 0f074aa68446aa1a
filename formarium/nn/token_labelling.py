"""Token labelling (Jiang et al., "All Tokens Matter", NeurIPS 2021): every patch of a classifier learns its own soft label, too.

The labels come from a map of class scores that a stronger network gave once; without one, each patch has the image's label. MixToken
swaps a box of patches between the images of a batch after the patch embedding, so no patch mixes two images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]  # (top, left, bottom, right) of patches, the ends exclusive
NO_BOX: Box = (0, 0, 0, 0)


def random_box(grid: tuple[int, int], generator: torch.Generator | None = None) -> Box:
    """A box whose share of the grid is uniform in 0..1 (a Beta(1, 1) draw) before it is cut at the border, at a uniform place."""
    share, row, column = torch.rand(3, generator=generator).tolist()
    height, width = int(grid[0] * share**0.5), int(grid[1] * share**0.5)
    row, column = int(row * grid[0]), int(column * grid[1])
    top, left = max(row - height // 2, 0), max(column - width // 2, 0)
    return top, left, min(row + height // 2, grid[0]), min(column + width // 2, grid[1])


def mix_tokens(x: Tensor, box: Box, scale: int = 1) -> Tensor:
    """The box, `scale` times as large, from the batch in reverse order: [batch, h, w, dim] -> the same shape. Its own inverse."""
    top, left, bottom, right = (scale * side for side in box)
    if bottom <= top or right <= left:
        return x
    inside = torch.zeros(x.shape[1:3], dtype=torch.bool, device=x.device)
    inside[top:bottom, left:right] = True
    return torch.where(inside[..., None], x.flip(0), x)


def token_label_loss(
    logits: Tensor,
    token_logits: Tensor,
    target: Tensor,
    token_target: Tensor | None = None,
    box: Box = NO_BOX,
    token_weight: float = 0.5,
    class_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """class_weight * CE(logits) + token_weight * CE(tokens), and the two terms.

    logits: float [batch, classes]. token_logits: float [batch, tokens, classes], unmixed. target: float [batch, classes], rows summing
    to 1. token_target: float [batch, classes, tokens]; None gives each token the image's. box: what MixToken took from the reversed
    batch: the class target is mixed by its share of the tokens.
    """
    tokens = token_logits.shape[1]
    share = max(0, box[2] - box[0]) * max(0, box[3] - box[1]) / tokens
    mixed = torch.lerp(target, target.flip(0), share) if share else target
    of_tokens = target[..., None].expand(-1, -1, tokens) if token_target is None else token_target
    cls = F.cross_entropy(logits, mixed)
    dense = F.cross_entropy(token_logits.transpose(1, 2), of_tokens)
    return class_weight * cls + token_weight * dense, cls, dense


def blend_truth(target: Tensor, truth: Tensor) -> Tensor:
    """The annotator's class target mixed with the ground truth, 0.5 of each where they agree on the class, else 0.9 of the annotator's."""
    share = 0.9 - 0.4 * (truth.argmax(-1) == target.argmax(-1)).to(target.dtype)
    return torch.lerp(truth, target, share[:, None])
