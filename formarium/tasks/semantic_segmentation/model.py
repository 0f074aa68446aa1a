"""What every semantic segmenter shares: the batch, the loss, prediction at the picture's own size, the checks.

A batch holds
    image       float32 [batch, 3, height, width], RGB in [0, 1]; smaller pictures stand in the upper left corner, zeros beside them
    size        int64 [batch, 2], (height, width) of each picture in the batch's pixels
    label       int64 [batch, height, width], class numbers, -1 where a pixel has none (beside the picture, too)   (training, evaluation)
    main_class  int64 [batch], the class that most pixels have                                                    (training, evaluation)
    id          list of strings
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.model import Batch, Losses, Model, check_tensor
from formarium.nn.tiling import sliding_window
from formarium.tasks.image_classification.model import IMAGENET_MEAN, IMAGENET_STD

IGNORE = -1


class Segments(NamedTuple):
    """label: int16 [batch, height, width], the likeliest class of each pixel. confidence: float32 of the same shape, its probability."""

    label: Tensor
    confidence: Tensor


class Segmenter(Model):
    """A network from a normalised image [batch, 3, height, width] to logits [batch, classes, height, width].

    Config has at least `num_classes`. With `window` in the preprocessing, pictures larger than it are predicted window by window, with
    `overlap`, so that memory doesn't grow with them. Subclasses write `forward`, and `auxiliary` terms of the loss where they have some.
    """

    task = "semantic-segmentation"
    mean: Tensor
    std: Tensor

    def __init__(self, config: Any):
        super().__init__(config)
        self.set_preprocessing({})

    def adopt(self, card: Any, variant: str, preprocessing: Mapping[str, Any]) -> None:
        super().adopt(card, variant, preprocessing)
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Mapping[str, Any]) -> None:
        self.preprocessing = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "size": 512, "window": None, "overlap": 1 / 3, **preprocessing}
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.preprocessing[key], dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        """[0, 1] to the mean and deviation that the weights were trained with."""
        return (image - self.mean) / self.std

    def forward_batch(self, batch: Batch) -> Any:
        return self(self.normalise(batch["image"]))

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy over the pixels that have a class."""
        ce = pixel_cross_entropy(self.forward_batch(batch), batch["label"])
        return Losses(ce, {"cross_entropy": ce})

    def predict(self, batch: Batch) -> Segments:
        image, window = self.normalise(batch["image"]), self.preprocessing["window"]
        if window and max(image.shape[2:]) > window:
            logits = sliding_window(self, image, (window, window), self.preprocessing["overlap"])
        else:
            logits = self(image)
        confidence, label = logits.float().softmax(1).max(1)
        return Segments(label.short(), confidence)

    @property
    def image_size(self) -> tuple[int, int]:
        side = self.preprocessing["size"]
        return (side, side) if isinstance(side, int) else tuple(side)

    def example(self, batch: int = 1, size: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 3, *(size or self.image_size), device=self.device),)

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        h, w = self.image_size
        return {f"{a}x{b}": self.example(1, (a, b)) for a, b in [(h + 1, w + 15), (2 * h, w), (7, 5)]}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        """Noise whose left and right halves have two brightnesses and two classes."""
        g, (h, w) = torch.Generator().manual_seed(seed), self.image_size
        image, label = torch.rand(batch, 3, h, w, generator=g) / 2, torch.zeros(batch, h, w, dtype=torch.int64)
        image[..., w // 2 :] += 0.5
        label[..., w // 2 :] = min(1, self.config.num_classes - 1)
        label[:, 0] = IGNORE
        made = {"image": image, "label": label, "size": torch.tensor([[h, w]] * batch), "main_class": label[:, -1, -1].clone()}
        return {**{k: v.to(self.device) for k, v in made.items()}, "id": [f"example {i}" for i in range(batch)]}

    def check_input(self, image: Any) -> None:
        check_tensor("image", image, "batch channels height width", sizes={1: 3})
        self.check_size(*image.shape[2:])

    def check_size(self, height: int, width: int) -> None:
        """Raise BadInput where the network can't take this size."""


def pixel_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """The mean over pixels that have a class (0 where none has). logits: float [batch, classes, h, w]; label: int64 [batch, h, w]."""
    total = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="sum")
    return total / (label != IGNORE).sum().clamp_min(1)
