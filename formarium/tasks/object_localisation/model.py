"""What every model that localises objects shares: the batch it takes, its prediction.

A batch holds
    image    float32 [batch, channels, height, width], RGB in [0, 1], squeezed to the network's size
    label    int64 [batch], class indices                                   (training and evaluation)
    boxes    float32 [batch, most, 4], (left, top, right, bottom) in pixels of `image`, NaN where a sample has fewer   (evaluation only)
    visible  float32 [batch, 4], the part of the file's own image that `image` shows, in its pixels
    pixels   int64 [batch, 2], height and width of the file's own image
    size     int64 [batch, 2], height and width of `image`
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from formarium.model import Batch
from formarium.nn.map_boxes import map_boxes
from formarium.tasks.image_classification.model import ImageClassifier


class Located(NamedTuple):
    """logits: float [batch, classes]. map: float [batch, h, w], how much of each place is object, in [0, 1]."""

    logits: Tensor
    map: Tensor


class Localised(NamedTuple):
    """probabilities: float32 [batch, classes]. label: int64 [batch]. box: float32 [batch, 4], (left, top, right, bottom) in pixels of the
    batch's image. map: float32 [batch, h, w] in [0, 1], on the network's grid."""

    probabilities: Tensor
    label: Tensor
    box: Tensor
    map: Tensor


class ObjectLocaliser(ImageClassifier):
    """An image classifier that also says where. `forward` takes a normalised image [batch, channels, height, width] and returns Located.

    `threshold` is where the map, from 0 to 1, becomes a box; it may be changed at any time and isn't a weight.
    """

    task = "object-localisation"
    threshold: float = 0.4

    def predict(self, batch: Batch) -> Localised:
        out = self.forward_batch(batch)
        size = (batch["image"].shape[2], batch["image"].shape[3])
        logits, found = out.logits.float(), out.map.float()
        return Localised(logits.softmax(-1), logits.argmax(-1), map_boxes(found, size, self.threshold), found)

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        """Random images, each with a box of half the sides in its middle."""
        import torch

        out = super().example_batch(batch, seed)
        height, width = out["image"].shape[2:]
        box = torch.tensor([width / 4, height / 4, 3 * width / 4, 3 * height / 4])
        whole = torch.tensor([0.0, 0.0, width, height])
        out |= {"boxes": box.expand(batch, 1, 4).clone(), "visible": whole.expand(batch, 4).clone()}
        out["pixels"] = out["size"] = torch.tensor([[height, width]] * batch)
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in out.items()}
