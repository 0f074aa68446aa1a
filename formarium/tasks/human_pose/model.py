"""What every top-down pose estimator shares: the batch it takes, its prediction, its checks.

A batch holds, one person a sample,
    image      float32 [batch, 3, height, width], RGB in [0, 1], the person cut out
    centre     float32 [batch, 2], (x, y), the middle of what was cut out, in pixels of the whole image
    extent     float32 [batch, 2], (width, height) of it, in pixels of the whole image
    box        float32 [batch, 4], (x, y, width, height), the person's box in the whole image
    box_score  float32 [batch], the detector's confidence, 1 for annotated boxes
    keypoints  float32 [batch, joints, 2], (x, y) in pixels of the cut-out image, pixel centres 0 .. width - 1   (training and evaluation)
    visible    float32 [batch, joints], 1 for joints that are annotated, else 0                                  (training and evaluation)
    truth      list of lists of COCO annotations, what the sample is scored by                                   (evaluation)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Model, check_tensor
from formarium.nn.heatmaps import dark, flip_back, swapped
from formarium.tasks.human_pose.joints import PAIRS
from formarium.tasks.image_classification.model import IMAGENET_MEAN, IMAGENET_STD


class Poses(NamedTuple):
    """keypoints: float32 [batch, joints, 2], (x, y) in pixels of the whole image. scores: float32 [batch, joints], the joints' confidences.
    score: float32 [batch], the person's: the mean over joints above 0.2, times the box's."""

    keypoints: Tensor
    scores: Tensor
    score: Tensor


class PoseEstimator(Model):
    """A network from a cut-out image [batch, 3, height, width] (normalised) to heat-maps [batch, joints, h, w].

    Config has at least `image_size` (height, width) and `num_joints`. `predict` averages the maps with those of the mirrored image where
    `flip_test` holds, decodes them (`dark`) and maps the places back into the whole image.
    """

    task = "human-pose"
    mean: Tensor
    std: Tensor
    flip_test = True
    blur_kernel = 11

    def __init__(self, config: Any):
        super().__init__(config)
        self.set_preprocessing({})

    def adopt(self, card: Any, variant: str, preprocessing: Mapping[str, Any]) -> None:
        super().adopt(card, variant, preprocessing)
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Mapping[str, Any]) -> None:
        self.preprocessing = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "padding": 1.25, **preprocessing, "size": self.image_size}
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.preprocessing[key], dtype=torch.float32).view(-1, 1, 1), persistent=False)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the cut-out image."""
        size = self.config.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Left and right joints; none where the joints aren't COCO's."""
        return PAIRS if self.config.num_joints == 17 else ()

    def normalise(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std

    def forward_batch(self, batch: Batch) -> Tensor:
        return self(self.normalise(batch["image"]))

    def heatmaps(self, batch: Batch) -> Tensor:
        """float32 [batch, joints, h, w]: the maps, averaged with the mirrored image's."""
        maps = self.forward_batch(batch).float()
        if not self.flip_test or not self.pairs:
            return maps
        mirrored = self(self.normalise(batch["image"].flip(-1))).float()
        return (maps + flip_back(mirrored, self.pairs)) / 2

    def predict(self, batch: Batch) -> Poses:
        maps = self.heatmaps(batch)
        places, scores = dark(maps, self.blur_kernel)
        size = places.new_tensor([maps.shape[-1] - 1, maps.shape[-2] - 1])
        keypoints = places / size * batch["extent"][:, None] + (batch["centre"] - batch["extent"] / 2)[:, None]
        sure = scores > 0.2
        score = torch.where(sure, scores, 0).sum(1) / sure.sum(1).clamp_min(1) * batch["box_score"]
        return Poses(keypoints, scores, score)

    def example(self, batch: int = 1, size: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 3, *(size or self.image_size), device=self.device),)

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        h, w = self.image_size
        sizes = [(h + 1, w + 15), (2 * h, w), (h // 2, 3 * w), (7, 5)]
        return {f"{a}x{b}": self.example(1, (a, b)) for a, b in sizes}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        h, w = self.image_size
        joints = self.config.num_joints
        keypoints = torch.rand(batch, joints, 2, generator=g) * torch.tensor([w - 1.0, h - 1.0])
        extent = torch.tensor([w - 1.0, h - 1.0]).expand(batch, 2).clone()
        made = {
            "image": torch.rand(batch, 3, h, w, generator=g),
            "centre": extent / 2,
            "extent": extent,
            "box": torch.tensor([0.0, 0.0, w, h]).expand(batch, 4).clone(),
            "box_score": torch.ones(batch),
            "keypoints": keypoints,
            "visible": (torch.rand(batch, joints, generator=g) < 0.9).float(),
        }
        return {**{k: v.to(self.device) for k, v in made.items()}, "id": [f"example {i}" for i in range(batch)]}

    def check_input(self, image: Any) -> None:
        check_tensor("image", image, "batch channels height width", sizes={1: 3})
        self.check_size(*image.shape[2:])

    def check_size(self, height: int, width: int) -> None:
        """Raise BadInput where the network can't take this size."""


def mirror(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as a mirror shows it: image and keypoints flipped, left and right joints exchanged."""
    width = batch["image"].shape[-1]
    order = swapped(PAIRS, batch["keypoints"].shape[1])
    keypoints = batch["keypoints"][:, order].clone()
    keypoints[..., 0] = width - 1 - keypoints[..., 0]
    return {**batch, "image": batch["image"].flip(-1), "keypoints": keypoints, "visible": batch["visible"][:, order]}


def check_keypoints(batch: Batch, joints: int) -> None:
    """BadInput where a batch can't be trained on."""
    if "keypoints" not in batch:
        raise BadInput("batch", expected="keypoints and visible", got=", ".join(batch), fix="train on annotated people")
    if batch["keypoints"].shape[1:] != (joints, 2):
        raise BadInput("keypoints", expected=f"[batch, {joints}, 2]", got=f"{[*batch['keypoints'].shape]}")
