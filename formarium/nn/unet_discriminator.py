"""The U-Net discriminator with spectral normalisation of Real-ESRGAN (Wang et al., ICCVW 2021, arXiv 2107.10833, section 3.4).

It says of every pixel how real its neighbourhood looks: three halvings, three doublings with the map of the same size added, two more
convolutions and a score. Every convolution but the first and the last is divided by its largest singular value.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from formarium.errors import BadInput


class UNetDiscriminator(nn.Module):
    """image: float [batch, channels, height, width], sides multiples of 8. Returns logits [batch, 1, height, width].

    dim: channels at full size; they double with each halving. skips: whether maps of the way down are added on the way up.
    Raises BadInput for other sides.
    """

    def __init__(self, channels: int = 3, dim: int = 64, skips: bool = True):
        super().__init__()
        widths = [dim, 2 * dim, 4 * dim, 8 * dim]
        self.skips = skips
        self.first = nn.Conv2d(channels, dim, 3, padding=1)
        self.down = nn.ModuleList(spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1, bias=False)) for a, b in pairwise(widths))
        self.up = nn.ModuleList(normed(a, b) for a, b in pairwise(widths[::-1]))
        self.extra = nn.ModuleList(normed(dim, dim) for _ in range(2))
        self.score = nn.Conv2d(dim, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[2:]
        if h % 8 or w % 8:
            raise BadInput("image size", expected="sides that are multiples of 8", got=f"{h}x{w}", fix="another patch")
        x = leaky(self.first(image))
        seen = []
        for conv in self.down:
            seen.append(x)
            x = leaky(conv(x))
        for conv in self.up:
            x = leaky(conv(F.interpolate(x, scale_factor=2, mode="bilinear")))
            x = x + seen.pop() if self.skips else x
        for conv in self.extra:
            x = leaky(conv(x))
        return self.score(x)


def normed(channels: int, wanted: int) -> nn.Module:
    return spectral_norm(nn.Conv2d(channels, wanted, 3, padding=1, bias=False))


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)
