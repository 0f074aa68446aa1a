"""What every object detector shares: the batch it takes, its prediction, its checks.

A batch holds
    image          float32 [batch, 3, height, width], RGB in [0, 1]; smaller pictures stand in the upper left corner, zeros beside them
    padding        bool [batch, height, width], True beside the picture
    size           int64 [batch, 2], (height, width) of each picture in the batch's pixels
    original_size  int64 [batch, 2], (height, width) of the whole picture, before resizing
    boxes          float32 [batch, objects, 4], (centre x, centre y, width, height) in shares of the picture, zeros where there is none
    labels         int64 [batch, objects], -1 where there is none                               (both: training)
    masks          bool [batch, objects, height, width], instance masks                         (training, where annotated)
    truth          list of lists of COCO annotations, what the sample is scored by              (evaluation)
    image_id       list of the pictures' numbers in their COCO file                             (evaluation)

Labels are COCO category numbers, as DETR's family has them: `num_classes` is the largest number plus one, and numbers no category has
stay empty (COCO's 80 categories are 91 classes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Model, check_tensor
from formarium.tasks.image_classification.model import IMAGENET_MEAN, IMAGENET_STD


class Detections(NamedTuple):
    """The likeliest boxes of each picture, best first. scores: float32 [batch, k] in [0, 1]. labels: int64 [batch, k]. boxes: float32
    [batch, k, 4], (left, top, right, bottom) in pixels of the original picture. masks: bool [batch, k, m, m], the instance inside its box
    (see nn/mask_codes.paste_masks), or None."""

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    masks: Tensor | None = None


class Detector(Model):
    """A network from (normalised image [batch, 3, height, width], padding mask [batch, height, width]) to its raw predictions.

    Config has at least `num_classes`. Subclasses write `forward`, `loss` and `predict`; `normalise`, checks and examples are here.
    """

    task = "object-detection"
    channel_axes = (1, None)
    mean: Tensor
    std: Tensor

    def __init__(self, config: Any):
        super().__init__(config)
        self.set_preprocessing({})

    def adopt(self, card: Any, variant: str, preprocessing: Mapping[str, Any]) -> None:
        super().adopt(card, variant, preprocessing)
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Mapping[str, Any]) -> None:
        self.preprocessing = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "size": 800, "max_size": 1333, **preprocessing}
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.preprocessing[key], dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        """[0, 1] to the mean and deviation that the weights were trained with."""
        return (image - self.mean) / self.std

    def prepared(self, batch: Batch) -> Tensor:
        """The network's image: normalised, zeros in the padding."""
        return self.normalise(batch["image"]).masked_fill(batch["padding"][:, None], 0.0)

    def forward_batch(self, batch: Batch) -> Any:
        return self(self.prepared(batch), batch["padding"])

    @property
    def example_size(self) -> tuple[int, int]:
        side = int(self.preprocessing["size"])
        return (side, side) if side <= 256 else (224, 224)

    def example(self, batch: int = 1, size: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
        h, w = size or self.example_size
        padding = torch.zeros(batch, h, w, dtype=torch.bool, device=self.device)
        if batch > 1:
            padding[1::2, :, w - w // 5 :] = True
        return torch.randn(batch, 3, h, w, device=self.device).masked_fill(padding[:, None], 0.0), padding

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        h, w = self.example_size
        sizes = [(h + 1, w + 15), (2 * h, w), (h // 2 + 3, w), (7, 5)]
        return {f"{a}x{b}": self.example(1, (a, b)) for a, b in sizes}

    def example_batch(self, batch: int = 2, seed: int = 0, objects: int = 3) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        h, w = self.example_size
        padding = torch.zeros(batch, h, w, dtype=torch.bool)
        size = torch.tensor([[h, w]] * batch)
        if batch > 1:
            padding[1, :, w - w // 5 :] = True
            size[1, 1] = w - w // 5
        centre = 0.25 + 0.5 * torch.rand(batch, objects, 2, generator=g)
        extent = 0.15 + 0.3 * torch.rand(batch, objects, 2, generator=g)
        boxes = torch.cat([centre, extent], -1)
        labels = torch.randint(min(1, self.config.num_classes - 1), self.config.num_classes, (batch, objects), generator=g)
        labels[0, -1], boxes[0, -1] = -1, 0
        ys = (torch.arange(h) + 0.5)[None, None, :, None] / size[:, 0, None, None, None]
        xs = (torch.arange(w) + 0.5)[None, None, None, :] / size[:, 1, None, None, None]
        inside = (((xs - boxes[..., 0, None, None]) / boxes[..., 2, None, None].clamp_min(1e-6)) ** 2) + (
            ((ys - boxes[..., 1, None, None]) / boxes[..., 3, None, None].clamp_min(1e-6)) ** 2
        )
        made = {
            "image": torch.rand(batch, 3, h, w, generator=g).masked_fill(padding[:, None], 0.0),
            "padding": padding,
            "size": size,
            "original_size": size.clone(),
            "boxes": boxes,
            "labels": labels,
            "masks": (inside < 0.25) & (labels >= 0)[..., None, None],
        }
        return {**{k: v.to(self.device) for k, v in made.items()}, "id": [f"example {i}" for i in range(batch)]}

    def check_input(self, image: Any, padding: Any) -> None:
        check_tensor("image", image, "batch channels height width", sizes={1: 3})
        check_tensor("padding", padding, "batch height width", dtype=lambda d: d == torch.bool)
        if padding.shape != (image.shape[0], *image.shape[2:]):
            got = f"{[*padding.shape]} for an image {[*image.shape]}"
            raise BadInput("padding", expected="a bool tensor [batch, height, width], the image's", got=got)
        self.check_size(*image.shape[2:])

    def check_size(self, height: int, width: int) -> None:
        """Raise BadInput where the network can't take this size."""


def check_targets(batch: Batch, num_classes: int) -> None:
    """BadInput where a batch can't be trained on."""
    if "boxes" not in batch or "labels" not in batch:
        raise BadInput("batch", expected="boxes and labels", got=", ".join(batch), fix="train on annotated pictures")
    top = int(batch["labels"].max()) if batch["labels"].numel() else -1
    if top >= num_classes:
        raise BadInput("labels", expected=f"below {num_classes}", got=str(top))


def level_padding(padding: Tensor, size: tuple[int, int]) -> Tensor:
    """The padding mask at a map's resolution, by the nearest pixel: bool [batch, *size]."""
    return F.interpolate(padding[None].float(), size=size)[0].bool()
