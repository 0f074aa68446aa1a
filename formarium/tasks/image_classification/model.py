"""What every image classifier shares: the batch it takes, its loss, its prediction, its checks.

A batch holds
    image   float32 [batch, channels, height, width], RGB in [0, 1]
    label   int64 [batch], class indices                            (training and evaluation)
    target  float32 [batch, classes], rows summing to 1             (training under mixup, cutmix or label smoothing; wins over label)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Losses, Model, check_tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Labels(NamedTuple):
    """probabilities: float32 [batch, classes], rows summing to 1. label: int64 [batch], the likeliest class."""

    probabilities: Tensor
    label: Tensor


class ImageClassifier(Model):
    """A backbone with a classification head, or (Config.dense) without one, giving a pyramid of maps.

    Config has at least `num_classes`, `in_channels`, `dense`. `forward` takes a normalised image [batch, channels, height, width] and
    returns logits [batch, classes], or the tuple of maps where dense. `loss` and `predict` take the task's batch and
    normalise it by the card's mean and std. Subclasses write `pyramid` (the maps) and `forward`.
    """

    task = "image-classification"
    mean: Tensor
    std: Tensor

    def __init__(self, config: Any):
        super().__init__(config)
        self.set_preprocessing({})

    def adopt(self, card: Any, variant: str, preprocessing: Mapping[str, Any]) -> None:
        super().adopt(card, variant, preprocessing)
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Mapping[str, Any]) -> None:
        self.preprocessing = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "size": 224, **preprocessing}
        channels = self.config.in_channels
        for key in ("mean", "std"):
            value = torch.tensor(self.preprocessing[key], dtype=torch.float32)
            if len(value) != channels:
                value = value.mean().expand(channels).clone()
            self.register_buffer(key, value.view(-1, 1, 1), persistent=False)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) it was built for, or its card's size where any size will do."""
        size = getattr(self.config, "image_size", None) or self.preprocessing["size"]
        return (size, size) if isinstance(size, int) else tuple(size)

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Maps [batch, channels, height / stride, width / stride], fine to coarse, of a normalised image."""
        raise NotImplementedError

    def normalise(self, image: Tensor) -> Tensor:
        """[0, 1] to the mean and deviation that the weights were trained with."""
        return (image - self.mean) / self.std

    def forward_batch(self, batch: Batch) -> Any:
        return self(self.normalise(batch["image"]))

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy with the soft targets where the batch has them, else with the labels."""
        return self.classification_loss(self.forward_batch(batch), batch)

    def classification_loss(self, logits: Tensor, batch: Batch) -> Losses:
        self._must_classify()
        loss = F.cross_entropy(logits.float(), batch["target"] if "target" in batch else batch["label"])
        return Losses(loss, {"cross_entropy": loss})

    def predict(self, batch: Batch) -> Labels:
        self._must_classify()
        logits = self.forward_batch(batch)
        return Labels(logits.float().softmax(-1), logits.argmax(-1))

    def _must_classify(self) -> None:
        if getattr(self.config, "dense", False):
            raise BadInput("a dense backbone", expected="a classifier", got="dense=True", fix="create it with dense=False")

    def example(self, batch: int = 1, size: int | tuple[int, int] | None = None) -> tuple[Tensor, ...]:
        h, w = self.image_size if size is None else (size, size) if isinstance(size, int) else size
        return (torch.randn(batch, self.config.in_channels, h, w, device=self.device),)

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        h, w = self.image_size
        sizes = [(h + 1, w + 15), (2 * h, w), (3 * h, 2 * w + 8), (7, 5)]
        return {f"{a}x{b}": self.example(1, (a, b)) for a, b in sizes}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        image = torch.rand(batch, self.config.in_channels, *self.image_size, generator=g)
        label = torch.randint(self.config.num_classes, (batch,), generator=g)
        return {"image": image.to(self.device), "label": label.to(self.device), "id": [f"example {i}" for i in range(batch)]}

    def check_input(self, image: Any) -> None:
        check_tensor("image", image, "batch channels height width", sizes={1: self.config.in_channels})
        self.check_size(*image.shape[2:])

    def check_size(self, height: int, width: int) -> None:
        """Raise BadInput where the network can't take this size."""
