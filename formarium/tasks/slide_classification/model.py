"""What every slide classifier shares: the batch it takes, its checks, its prediction.

A batch holds either of
    tiles     float32 [batch, tiles, 3, height, width], RGB in [0, 1]
    features  float32 [batch, tiles, width], whatever an encoder gave
and
    mask      bool [batch, tiles], which tiles are real (bags are padded to the longest)
    coords    float32 [batch, tiles, 2], x and y of each tile's upper left corner in pixels of its level (0 where unknown)
    label     int64 [batch], class indices                              (training and evaluation)
    id        list of strings, the slides' names
    patient   list of strings, whose slides they are                     (where known; folds never split a patient)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Model, check_tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SlideLabels(NamedTuple):
    """probabilities: float32 [batch, classes], rows summing to 1. label: int64 [batch], the likeliest class. attention: float32 [batch,
    tiles], how much each tile counted: sums to 1, 0 on padding."""

    probabilities: Tensor
    label: Tensor
    attention: Tensor


class SlideClassifier(Model):
    """A model of bags. Config has at least `features` (the width of ready-made features, 0 for tile images), `num_classes`, `in_channels`
    and `image_size`. `forward` takes (tiles, mask): tiles normalised, or features."""

    task = "slide-classification"
    channel_axes = (2, None)
    mean: Tensor
    std: Tensor

    def __init__(self, config: Any):
        super().__init__(config)
        self.set_preprocessing({})

    def adopt(self, card: Any, variant: str, preprocessing: Any) -> None:
        super().adopt(card, variant, preprocessing)
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Any) -> None:
        self.preprocessing = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "size": 224, **preprocessing}
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.preprocessing[key], dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std

    def inputs_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(tiles normalised or features, mask). Raises BadInput where the bags are of the other kind."""
        kind = "features" if self.config.features else "tiles"
        if kind not in batch:
            got = "bags of tile images" if "tiles" in batch else "bags of features"
            fix = "extract features first" if kind == "features" else "create it with features=<width>"
            raise BadInput("bags", expected=f"bags of {'features' if kind == 'features' else 'tile images'}", got=got, fix=fix)
        x = batch[kind]
        return (x if kind == "features" else self.normalise(x)), batch["mask"]

    def forward_batch(self, batch: Batch) -> Any:
        return self(*self.inputs_of(batch))

    def example(self, batch: int = 1, tiles: int = 6) -> tuple[Tensor, ...]:
        return torch.randn(batch, tiles, *self._tile_shape(), device=self.device), self._example_mask(batch, tiles)

    def _tile_shape(self) -> tuple[int, ...]:
        c = self.config
        return (c.features,) if c.features else (c.in_channels, c.image_size, c.image_size)

    def _example_mask(self, batch: int, tiles: int) -> Tensor:
        lengths = tiles - torch.arange(batch, device=self.device) % 3
        return torch.arange(tiles, device=self.device) < lengths.clamp_min(1)[:, None]

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        examples = {f"{n} tiles": self.example(2, n) for n in (1, 3, 11)}
        if not self.config.features:
            side, channels = self.config.image_size, self.config.in_channels
            for h, w in ((2 * side, side), (side + 1, side), (7, 5)):
                examples[f"tiles of {h}x{w}"] = (torch.randn(1, 3, channels, h, w, device=self.device), self._example_mask(1, 3))
        return examples

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        g, n = torch.Generator().manual_seed(seed), 8
        x = torch.rand(batch, n, *self._tile_shape(), generator=g)
        label = torch.randint(max(2, self.config.num_classes), (batch,), generator=g)
        coords = torch.stack([torch.arange(n) % 4, torch.arange(n) // 4], 1).float()[None].repeat(batch, 1, 1) * 32
        kind = "features" if self.config.features else "tiles"
        out = {kind: x, "mask": self._example_mask(batch, n).cpu(), "coords": coords, "label": label}
        return {**{k: v.to(self.device) for k, v in out.items()}, "id": [f"example {i}" for i in range(batch)]}

    def check_input(self, tiles: Any, mask: Any) -> None:
        c = self.config
        if c.features:
            check_tensor("features", tiles, "batch tiles width", sizes={2: c.features})
        else:
            check_tensor("tiles", tiles, "batch tiles channels height width", sizes={2: c.in_channels})
            self.check_size(*tiles.shape[3:])
        check_tensor("mask", mask, "batch tiles", sizes={0: tiles.shape[0], 1: tiles.shape[1]}, dtype=lambda d: d == torch.bool)
        if mask.device.type == "cpu" and not mask.any(1).all():
            raise BadInput("mask", expected="at least one real tile a slide", got="a slide without one")

    def check_size(self, height: int, width: int) -> None:
        """Raise BadInput where the network can't take tiles of this size."""
