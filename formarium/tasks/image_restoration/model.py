"""What every image restorer shares: the batch it takes, its prediction, its padding and tiling, its checks.

A batch holds
    image   float32 [batch, channels, height, width], degraded, RGB (or grey) in [0, 1]
    target  float32 [batch, channels, upscale * height, upscale * width], clean, in [0, 1]     (training and evaluation)
    upscale int64 [batch], how many times larger the target is
    id      list of strings
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Losses, Model, check_tensor
from formarium.nn.tiling import reflect_to_multiple, tiled


class Restored(NamedTuple):
    """image: float32 [batch, channels, upscale * height, upscale * width] in [0, 1]."""

    image: Tensor


class ImageRestorer(Model):
    """A network from a degraded image to a clean one, `upscale` times as large.

    Config has at least `in_channels` and `upscale`. `forward` takes an image [batch, channels, height, width] in [0, 1] of any size and
    returns [batch, channels, upscale * height, upscale * width], not clamped. Larger images than `tile` (of the card's preprocessing) are
    predicted tile by tile with `tile_margin` pixels around each, so that memory doesn't grow with the image.
    """

    task = "image-restoration"
    multiple = 1  # sides are mirrored up to a multiple of this before tiles are cut

    def __init__(self, config: Any):
        super().__init__(config)
        self.set_preprocessing({})

    def adopt(self, card: Any, variant: str, preprocessing: Any) -> None:
        super().adopt(card, variant, preprocessing)
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Any) -> None:
        own = {"degradation": "bicubic" if self.config.upscale > 1 else "noise", "sigma": 25, "quality": 10, "tile": 256, "tile_margin": 32}
        self.preprocessing = {"size": 64, **own, **preprocessing, "upscale": self.config.upscale, "channels": self.config.in_channels}

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of its examples; it takes any size."""
        size = self.preprocessing["size"]
        return (size, size) if isinstance(size, int) else tuple(size)

    def forward_batch(self, batch: Batch) -> Any:
        return self(batch["image"])

    def loss(self, batch: Batch) -> Losses:
        """The mean absolute difference (L1), over pixels and channels."""
        l1 = F.l1_loss(self.forward_batch(batch).float(), batch["target"])
        return Losses(l1, {"l1": l1})

    def predict(self, batch: Batch) -> Restored:
        """The whole image at once where it fits a tile, else tile by tile; clamped to [0, 1]."""
        image, scale = batch["image"], self.config.upscale
        h, w = image.shape[2:]
        padded = reflect_to_multiple(image, self.multiple)
        out = tiled(self, padded, self.preprocessing["tile"], self.preprocessing["tile_margin"], scale)
        return Restored(out[..., : h * scale, : w * scale].float().clamp(0, 1))

    def example(self, batch: int = 1, size: int | tuple[int, int] | None = None) -> tuple[Tensor, ...]:
        h, w = self.image_size if size is None else (size, size) if isinstance(size, int) else size
        return (torch.rand(batch, self.config.in_channels, h, w, device=self.device),)

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        h, w = self.image_size
        sizes = [(h + 1, w + 15), (2 * h, w), (7, 5), (1, 1)]
        return {f"{a}x{b}": self.example(1, (a, b)) for a, b in sizes}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        """Smooth random images; the degraded ones are averaged down (noisy, where nothing is enlarged) and faded."""
        g, s, c = torch.Generator().manual_seed(seed), self.config.upscale, self.config.in_channels
        h, w = (side * s for side in self.image_size)
        target = F.interpolate(torch.rand(batch, c, max(2, h // 8), max(2, w // 8), generator=g), (h, w), mode="bilinear")
        image = F.avg_pool2d(target, s) if s > 1 else target + 0.1 * torch.randn(target.shape, generator=g)
        image = (0.7 * image + 0.1).clamp(0, 1)
        known = {"upscale": torch.full((batch,), s), "id": [f"example {i}" for i in range(batch)]}
        return {"image": image.to(self.device), "target": target.to(self.device), **known}

    def check_input(self, image: Any) -> None:
        check_tensor("image", image, "batch channels height width", sizes={1: self.config.in_channels})
        self.check_size(*image.shape[2:])

    def check_size(self, height: int, width: int) -> None:
        """Raise BadInput where the network can't take this size."""


def check_scale(image: Tensor, target: Tensor, scale: int) -> None:
    """Raise BadInput where the clean image isn't `scale` times as large as the degraded one."""
    wanted = [side * scale for side in image.shape[-2:]]
    if [*target.shape[-2:]] != wanted:
        raise BadInput("target", expected=f"{wanted[0]}x{wanted[1]} (the image enlarged {scale} times)", got=f"{[*target.shape[-2:]]}")
