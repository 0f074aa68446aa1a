"""Self-supervision of an encoder of volumes (Tang et al., CVPR 2022, arXiv 2111.14791), by three questions about a damaged view:
by how many quarter turns was it turned, which other view shows the same volume, what was there before blocks of it were lost?

    L = cross entropy of the turns + NT-Xent of the embeddings + |rebuilt - undamaged|      (mean), each with a weight, 1 as published

Views are made in the batch: a block that is lost holds noise in [0, 1] or, after that, what another sample of the batch has there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput, UnknownName

UPSAMPLINGS = ("vae", "deconv", "large_kernel_deconv")
Box = tuple[slice, ...]


# views --------------------------------------------------------------------------------------------------------------


def turned(image: Tensor, plane: tuple[int, int] = (-2, -1)) -> tuple[Tensor, Tensor]:
    """Every sample by its own random number of quarter turns: (float [batch, channels, *spatial], int64 [batch] in 0 .. 3).

    plane: the two axes, counted from the last, that turn into each other, of one size. Raises BadInput where they aren't.
    """
    sides = [image.shape[axis] for axis in plane]
    if sides[0] != sides[1]:
        what, fix = "the plane that volumes are turned in", "a patch with these sides alike"
        raise BadInput(what, expected="two sides of one length", got=f"{sides[0]} and {sides[1]}", fix=fix)
    turns = torch.randint(4, (len(image),))
    return torch.stack([torch.rot90(x, k, plane) for x, k in zip(image, turns.tolist(), strict=True)]), turns.to(image.device)


def random_boxes(sides: Sequence[int], most: float = 0.3, smallest: float = 0.05, largest: float = 0.25) -> list[Box]:
    """Boxes that together have a random share, up to `most`, of the voxels (those in two boxes are counted twice, the last box is whole).

    A box's side is from `smallest` to below `largest` of the volume's; one that starts near the end is cut off there.
    Raises BadInput for a side below 8.
    """
    if min(sides) < 8:
        raise BadInput("volumes to cut from", expected="sides of at least 8", got="x".join(map(str, sides)))
    size = torch.tensor([*sides], dtype=torch.float64)
    low, high = (smallest * size).floor(), (largest * size).floor()
    wanted = float(torch.rand(())) * most * math.prod(sides)
    boxes: list[Box] = []
    while wanted > 0:
        u = torch.rand(32, 2, len(sides), dtype=torch.float64)
        start = (u[:, 0] * (size - low)).floor()
        stop = torch.minimum(start + low + (u[:, 1] * (high - low)).floor(), size)
        for a, b in zip(start.long().tolist(), stop.long().tolist(), strict=True):
            if wanted <= 0:
                break
            boxes.append(tuple(map(slice, a, b)))
            wanted -= math.prod(y - x for x, y in zip(a, b, strict=True))
    return boxes


def fill(x: Tensor, boxes: Sequence[Box], other: Tensor | None = None) -> None:
    """Overwrite boxes of one sample [channels, *spatial]: by what `other` has there, or by normal noise scaled to [0, 1] within the box."""
    for box in boxes:
        part = x[(slice(None), *box)]
        if other is not None:
            part.copy_(other[(slice(None), *box)])
        elif part.numel():
            noise = torch.randn_like(part)
            low, high = noise.aminmax()
            part.copy_((noise - low) / (high - low).clamp_min(1e-12))


def damaged(image: Tensor) -> Tensor:
    """A copy of a batch [batch, channels, *spatial] with random boxes lost, sample after sample: to noise, then to another sample of the
    batch as it is at that moment (to none where the draw falls on the sample itself)."""
    out = image.detach().clone()
    for i, x in enumerate(out):
        fill(x, random_boxes(x.shape[1:]))
        other = int(torch.randint(len(out), ()))
        if other != i:
            fill(x, random_boxes(x.shape[1:]), out[other])
    return out


# what is asked of the encoder ---------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """turn: logits float [batch, 4]. embedding: float [batch, width]. rebuilt: float [batch, channels, *spatial]."""

    turn: Tensor
    embedding: Tensor
    rebuilt: Tensor


class PretextHeads(nn.Module):
    """The heads on an encoder's deepest map, 1/32 of the volume's sides. x: float [batch, dim, *grid], at least two places.

    The turn is read from the first place, the embedding from the second; from the whole map the volume is rebuilt.
    """

    def __init__(self, dim: int, channels: int, upsampling: str = "vae", embedding: int = 512, dims: int = 3):
        super().__init__()
        self.rotation = nn.Linear(dim, 4)
        self.contrast = nn.Linear(dim, embedding)
        self.rebuild = rebuilder(dim, channels, upsampling, dims)

    def forward(self, x: Tensor) -> Answers:
        first, second = x.flatten(2)[:, :, :2].unbind(2)
        return Answers(self.rotation(first), self.contrast(second), self.rebuild(x))


def rebuilder(dim: int, channels: int, upsampling: str, dims: int = 3) -> nn.Module:
    """From [batch, dim, *grid] to [batch, channels, *(32 grid)]. Raises UnknownName for an upsampling there isn't.

    vae: convolutions with instance norm that halve the width, each followed by linear enlargement. deconv: five transposed convolutions.
    large_kernel_deconv: one, of kernel 32.
    """
    conv, up = (nn.Conv3d, nn.ConvTranspose3d) if dims == 3 else (nn.Conv2d, nn.ConvTranspose2d)
    widths = [dim // 2**i for i in range(5)]
    if upsampling == "large_kernel_deconv":
        return up(dim, channels, 32, 32)
    if upsampling == "deconv":
        return nn.Sequential(*(up(a, b, 2, 2) for a, b in zip(widths, [*widths[1:], channels], strict=True)))
    if upsampling != "vae":
        raise UnknownName("upsampling", upsampling, UPSAMPLINGS)
    norm = nn.InstanceNorm3d if dims == 3 else nn.InstanceNorm2d
    mode = "trilinear" if dims == 3 else "bilinear"
    layers: list[nn.Module] = []
    for a, b in zip(widths, [*widths[1:], widths[-1]], strict=True):
        layers += [conv(a, b, 3, padding=1), norm(b), nn.LeakyReLU(0.01), nn.Upsample(scale_factor=2, mode=mode)]
    return nn.Sequential(*layers, conv(widths[-1], channels, 1))


def contrast_loss(one: Tensor, other: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent (Chen et al., SimCLR, ICML 2020): of all other embeddings of both views, the sample's own other view should be the nearest.

    one, other: float [batch, width]. With a batch of one there is nothing to tell apart: 0.
    """
    z = F.normalize(torch.cat([one, other]), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    alike = (z @ z.T / temperature).masked_fill(itself, -math.inf)
    return F.cross_entropy(alike, torch.arange(len(z), device=z.device).roll(len(one)))


def pretext_losses(
    answers: Answers, turns: Tensor, image: Tensor, temperature: float = 0.5, weights: Sequence[float] = (1.0, 1.0, 1.0)
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the weighted total, its terms) of what was said of two views of a batch, the first view's samples before the second's.

    turns: int64 [2 batch]. image: the turned, undamaged views, float [2 batch, channels, *spatial].
    weights: of turns, contrast, rebuilding.
    """
    one, other = answers.embedding.float().chunk(2)
    terms = {
        "rotation": F.cross_entropy(answers.turn.float(), turns),
        "contrast": contrast_loss(one, other, temperature),
        "reconstruction": F.l1_loss(answers.rebuilt.float(), image),
    }
    return torch.stack([w * t for w, t in zip(weights, terms.values(), strict=True)]).sum(), terms
