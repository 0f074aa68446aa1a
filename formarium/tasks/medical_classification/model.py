"""What every classifier of medical images shares: the batch it takes, its loss, its prediction, its checks.

A batch holds
    image   float32 in [0, 1]: [batch, 3, height, width] of 2D images (RGB), or [batch, 1, height, width, depth] of 3D volumes (grey). Where
            samples of both ranks were drawn together it is a list of one tensor a sample, [3, height, width] or
            [1, height, width, depth]; `by_rank` makes batches of one rank each of it, and models work through those one after the other.
    rank    int64 [batch], 2 or 3
    label   int64 [batch], class indices                            (training and evaluation)
    id      list of str
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Losses, Model, check_tensor

RANKS = {2: "images", 3: "volumes"}


class Labels(NamedTuple):
    """probabilities: float32 [batch, classes], rows summing to 1. label: int64 [batch], the likeliest class."""

    probabilities: Tensor
    label: Tensor


def by_rank(batch: Batch) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """(where its samples stand in `batch`, int64; a batch of one rank) for each rank there is, images first."""
    image, size = batch["image"], len(batch["image"])
    if torch.is_tensor(image):
        yield torch.arange(size), dict(batch)
        return
    for rank in (2, 3):
        at = [i for i, x in enumerate(image) if x.ndim == rank + 1]
        if not at:
            continue
        index, part = torch.tensor(at), {}
        for key, value in batch.items():
            if key == "image":
                part[key] = torch.stack([image[i] for i in at])
            elif torch.is_tensor(value) and value.ndim and len(value) == size:
                part[key] = value[index.to(value.device)]
            else:
                part[key] = [value[i] for i in at] if isinstance(value, (list, tuple)) and len(value) == size else value
        yield index, part


class MedicalClassifier(Model):
    """A network that takes images and volumes alike.

    Config has at least `num_classes`, `in_channels` and `image_size`. `forward` takes one batch of one rank, float [batch, channels,
    height, width] or [batch, 1 or channels, height, width, depth], normalised, and returns logits [batch, classes]. `loss` and `predict`
    take the task's batch and normalise it by the card's mean and std (numbers for all channels; by default 0 and 1: values stay in [0, 1]).
    """

    task = "medical-classification"
    mean: Tensor
    std: Tensor

    def __init__(self, config: Any):
        super().__init__(config)
        self.set_preprocessing({})

    def adopt(self, card: Any, variant: str, preprocessing: Mapping[str, Any]) -> None:
        super().adopt(card, variant, preprocessing)
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Mapping[str, Any]) -> None:
        self.preprocessing = {"size": 224, "depth": 112, "mean": 0.0, "std": 1.0, **preprocessing}
        for key in ("mean", "std"):
            self.register_buffer(key, torch.full((1, 1, 1), float(self.preprocessing[key])), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        """[0, 1] to the mean and deviation that the weights were trained with."""
        return (image - self.mean) / self.std

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) it was built for."""
        size = self.config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def volume_size(self) -> tuple[int, int, int]:
        """(height, width, depth) of the volumes it was built for."""
        return (*self.image_size, int(self.preprocessing["depth"]))

    def parts(self, batch: Batch) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """`by_rank`, on the model's device."""
        for index, part in by_rank(batch):
            yield index, {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in part.items()}

    def forward_batch(self, batch: Batch) -> Any:
        if not torch.is_tensor(batch["image"]):
            found = [part for _, part in self.parts(batch)]
            if len(found) > 1:
                raise BadInput(
                    "a batch", expected="samples of one rank", got="images and volumes", fix="take one rank: data.of_rank(data, 2)"
                )
            batch = found[0]
        return self(self.normalise(batch["image"].to(self.device)))

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy, the mean over all samples whatever their rank."""
        total, count = [], len(batch["image"])
        for _, part in self.parts(batch):
            logits = self(self.normalise(part["image"]))
            total.append(F.cross_entropy(logits.float(), part["label"], reduction="sum") / count)
        loss = torch.stack(total).sum()
        return Losses(loss, {"cross_entropy": loss})

    def predict(self, batch: Batch) -> Labels:
        order, found = [], []
        for index, part in self.parts(batch):
            order.append(index)
            found.append(self(self.normalise(part["image"])).float())
        logits = torch.cat(found)[torch.cat(order).argsort().to(found[0].device)]
        return Labels(logits.softmax(-1), logits.argmax(-1))

    def example(self, batch: int = 1, size: int | tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
        """A random image batch, or of volumes where `size` has three numbers (height, width, depth)."""
        sides = self.image_size if size is None else (size, size) if isinstance(size, int) else tuple(size)
        channels = self.config.in_channels if len(sides) == 2 else 1
        return (torch.rand(batch, channels, *sides, device=self.device),)

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        (h, w), (_, _, d) = self.image_size, self.volume_size
        sizes: list[tuple[int, ...]] = [(h + 1, w + 15), (2 * h, w), (7, 5), (h, w, d), (h, 2 * w, d), (h, w, 3), (h, w + 1, d)]
        return {"x".join(map(str, s)): self.example(1, s) for s in sizes}

    def example_batch(self, batch: int = 2, seed: int = 0, rank: int = 2) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        shape = (self.config.in_channels, *self.image_size) if rank == 2 else (1, *self.volume_size)
        image = torch.rand(batch, *shape, generator=g)
        label = torch.randint(self.config.num_classes, (batch,), generator=g)
        found = {"image": image, "label": label, "rank": torch.full((batch,), rank)}
        return {**{k: v.to(self.device) for k, v in found.items()}, "id": [f"example {i}" for i in range(batch)]}

    def check_input(self, image: Any) -> None:
        channels = self.config.in_channels
        if torch.is_tensor(image) and image.ndim == 5:
            check_tensor("volume", image, "batch channels height width depth")
            if image.shape[1] not in (1, channels):
                raise BadInput("volume", expected=f"1 channel or {channels}", got=f"{image.shape[1]}")
        else:
            check_tensor("image", image, "batch channels height width", sizes={1: channels})
        self.check_size(tuple(image.shape[2:]))

    def check_size(self, sides: tuple[int, ...]) -> None:
        """Raise BadInput where the network can't take (height, width) or (height, width, depth)."""
