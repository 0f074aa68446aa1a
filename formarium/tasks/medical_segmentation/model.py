"""What every segmenter of volumes (or slices) shares: the batch, the loss, the sliding window, the checks.

A batch holds
    image   float32 [batch, channels, *spatial], each channel with mean 0 and deviation 1 over its non-zero voxels; zero elsewhere
    label   int64 [batch, *spatial], 0 for background                         (training and evaluation; not in pre-training)
    affine  float64 [batch, 4, 4], from voxel indices to millimetres                         (where the files have one)
    id      list of strings
*spatial is three sides (in the order of the file's axes), or two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Losses, Model, check_tensor
from formarium.nn.tiling import sliding_window

Regions = Sequence[Sequence[int]]


class Segmented(NamedTuple):
    """label: int16 [batch, *spatial]. mask: bool [batch, regions, *spatial], each region's voxels (each class's but the background's)."""

    label: Tensor
    mask: Tensor


class Rebuilt(NamedTuple):
    """What an encoder in pre-training makes of volumes without a decoder.

    image: the rebuilt voxels, damaged: what it saw, whole: the truth, all float [batch, channels, *window]. turn: by how many quarter turns
    the view is turned, as it says, turns: the truth, both int64 [batch].
    """

    image: Tensor
    damaged: Tensor
    whole: Tensor
    turn: Tensor
    turns: Tensor


class VolumeSegmenter(Model):
    """A network from volumes to one logit a region or class and voxel.

    Config has at least `in_channels`, `out_channels`, `spatial_dims`, `regions`, `cross_entropy`. With `regions` each output channel is one
    region, a set of labels, and regions may overlap (sigmoid, above one half); without, each is one class, 0 the background (softmax).
    `forward` takes a normalised image; `predict` takes any size, by a sliding window of the card's `window` and `overlap`.
    """

    task = "medical-segmentation"

    def __init__(self, config: Any):
        super().__init__(config)
        if config.regions and len(config.regions) != config.out_channels:
            raise BadInput("out_channels", expected=f"one for each of the {len(config.regions)} regions", got=str(config.out_channels))
        self.set_preprocessing({})

    def adopt(self, card: Any, variant: str, preprocessing: Any) -> None:
        super().adopt(card, variant, preprocessing)
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Any) -> None:
        self.preprocessing = {"window": 128, "overlap": 0.5, **preprocessing, "channels": self.config.in_channels}
        self.preprocessing |= {"regions": self.config.regions, "classes": self.config.out_channels}

    @property
    def window_size(self) -> tuple[int, ...]:
        """Sides of the sliding window; the card's first ones, where it has more than the network."""
        window = self.preprocessing["window"]
        return (window,) * self.config.spatial_dims if isinstance(window, int) else tuple(window)[: self.config.spatial_dims]

    def study(self, data: Any) -> None:
        if self.config.out_channels and "out_channels" not in data.model_args:
            fix = "pre-train an encoder on them: a variant with out_channels = 0"
            raise BadInput(f"{data.name}", expected="volumes with masks", got="volumes without", fix=fix)

    def forward_batch(self, batch: Batch) -> Any:
        return self(batch["image"])

    def loss(self, batch: Batch) -> Losses:
        """Soft Dice with squared denominators, and (where configured) cross entropy: per region, or over classes."""
        logits, c = self.forward_batch(batch).float(), self.config
        label = batch["label"]
        if c.regions:
            target = region_masks(label, c.regions).float()
            probabilities = logits.sigmoid()
        else:
            target = F.one_hot(label, c.out_channels).movedim(-1, 1).float()
            probabilities = logits.softmax(1)
        dice = dice_loss(probabilities, target)
        if not c.cross_entropy:
            return Losses(dice, {"dice": dice})
        ce = F.binary_cross_entropy_with_logits(logits, target) if c.regions else F.cross_entropy(logits, label)
        return Losses(dice + c.cross_entropy * ce, {"dice": dice, "cross_entropy": ce})

    def predict(self, batch: Batch) -> Segmented:
        """Sliding window over the whole image, logits averaged with gaussian weights; masks in the image's own size."""
        c = self.config
        logits = sliding_window(self, batch["image"].float(), self.window_size, self.preprocessing["overlap"])
        if c.regions:
            mask = logits > 0  # a probability above one half
            return Segmented(compose(mask, c.regions), mask)
        label = logits.argmax(1)
        return Segmented(label.short(), F.one_hot(label, c.out_channels).movedim(-1, 1)[:, 1:].bool())

    def example(self, batch: int = 1, size: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
        return (torch.randn(batch, self.config.in_channels, *(size or self.window_size), device=self.device),)

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        first, *rest = self.window_size
        sizes = [(first + 32, *rest), (2 * first, *rest), (first + 1, *rest), (7,) * (1 + len(rest))]
        return {"x".join(map(str, s)): self.example(1, s) for s in sizes}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        """Noise with boxes, one of each label, brighter than the rest."""
        c, g = self.config, torch.Generator().manual_seed(seed)
        labels = sorted({v for r in c.regions for v in r}) if c.regions else [*range(1, c.out_channels)]
        image = torch.randn(batch, c.in_channels, *self.window_size, generator=g)
        label = torch.zeros(batch, *self.window_size, dtype=torch.int64)
        for i in range(batch):
            for value in labels:
                low = [int(torch.randint(0, s - s // 2, (), generator=g)) for s in self.window_size]
                box = tuple(slice(a, a + s // 2) for a, s in zip(low, self.window_size, strict=True))
                label[(i, *box)] = value
        image = image + label[:, None]
        return {"image": image.to(self.device), "label": label.to(self.device), "id": [f"example {i}" for i in range(batch)]}

    def check_input(self, image: Any) -> None:
        axes = "depth height width" if self.config.spatial_dims == 3 else "height width"
        check_tensor("image", image, f"batch channels {axes}", sizes={1: self.config.in_channels})
        self.check_size(*image.shape[2:])

    def check_size(self, *sides: int) -> None:
        """Raise BadInput where the network can't take this size."""


def central(image: Tensor, sides: Sequence[int]) -> Tensor:
    """The middle of volumes [batch, channels, *spatial], with zeros around where they are smaller: [batch, channels, *sides]."""
    room = [side - have for side, have in zip(sides, image.shape[2:], strict=True)]
    return F.pad(image, [pad for r in reversed(room) for pad in (r // 2, r - r // 2)])


def dice_loss(probabilities: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 - 2 sum(p g) / (sum p^2 + sum g^2), sums over space, the mean over batch and channels. Both float [batch, channels, *spatial]."""
    axes = tuple(range(2, probabilities.ndim))
    overlap = (probabilities * target).sum(axes)
    size = (probabilities**2).sum(axes) + (target**2).sum(axes)
    return (1 - (2 * overlap + smooth) / (size + smooth)).mean()


def region_masks(label: Tensor, regions: Regions) -> Tensor:
    """int [batch, *spatial] -> bool [batch, regions, *spatial]."""
    return torch.stack([torch.isin(label, torch.tensor([*r], device=label.device)) for r in regions], 1)


def compose(mask: Tensor, regions: Regions) -> Tensor:
    """Region masks bool [batch, regions, *spatial] -> labels int16 [batch, *spatial].

    Larger regions first, each painted with the label that no smaller one inside it has, so that nested regions give back their labels.
    """
    label = torch.zeros(mask.shape[0], *mask.shape[2:], dtype=torch.int16, device=mask.device)
    for i in sorted(range(len(regions)), key=lambda i: -len(regions[i])):
        smaller = {v for r in regions if len(r) < len(regions[i]) for v in r}
        own = sorted({*regions[i]} - smaller) or sorted(regions[i])
        label = torch.where(mask[:, i], torch.tensor(own[0], dtype=torch.int16, device=mask.device), label)
    return label


def channel_count(regions: Regions, classes: int) -> int:
    """How many masks a prediction has."""
    return len(regions) if regions else classes - 1


def is_whole(values: Any) -> bool:
    return all(math.isfinite(v) and v == int(v) for v in values)
