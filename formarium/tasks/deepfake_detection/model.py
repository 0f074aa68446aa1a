"""What every deepfake detector shares: the batch it takes, its loss, its verdict on a video, its checks.

A batch holds
    frames  float32 [batch, frames, 3, height, width], RGB in [0, 1]: crops of the face, evenly spaced in time
    label   int64 [batch], 0 for fake and 1 for real, as the folders' names sort                     (training and evaluation)
    id      list of str, a video's name each
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Losses, check_tensor
from formarium.tasks.image_classification.model import ImageClassifier

FAKE, REAL = 0, 1
NAMES = ("fake", "real")
FRAMES_AT_A_TIME = 64  # when videos are judged


class Verdict(NamedTuple):
    """label: int64 [batch], 0 fake or 1 real, whichever scores higher. fake: float32 [batch] in [0, 1], how fake the video is.
    probabilities: float32 [batch, 2], rows summing to 1, the mean over frames (and networks) of each one's softmax.
    frames: float32 [batch, frames], each frame's probability of being fake."""

    label: Tensor
    fake: Tensor
    probabilities: Tensor
    frames: Tensor


class DeepfakeDetector(ImageClassifier):
    """Judges frames, and a video by the mean over its frames.

    Config has at least `in_channels`. `forward` takes normalised frames [frames, 3, height, width] and returns logits
    [frames, networks, 2], one row for each network it consists of (fake first). Subclasses write `forward`, and `loss` where there
    is more to learn than the label.
    """

    task = "deepfake-detection"

    def forward_batch(self, batch: Batch) -> Any:
        frames = batch["frames"]
        if frames.ndim != 5:
            raise BadInput("frames", expected="[batch, frames, 3, height, width]", got=f"{[*frames.shape]}")
        return self(self.normalise(frames.flatten(0, 1)))

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy of every frame with its video's label, the mean over networks."""
        logits = self.forward_batch(batch)  # (b n) networks 2
        label = batch["label"].repeat_interleave(batch["frames"].shape[1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), label.repeat_interleave(logits.shape[1]))
        return Losses(loss, {"cross_entropy": loss})

    def predict(self, batch: Batch) -> Verdict:
        """A verdict a video; the frames of all of them go through a few dozen at a time."""
        frames = batch["frames"]
        logits = torch.cat([self.forward_batch({"frames": part[:, None]}) for part in frames.flatten(0, 1).split(FRAMES_AT_A_TIME)])
        return verdict(logits.float().unflatten(0, frames.shape[:2]))

    def example_batch(self, batch: int = 2, seed: int = 0, frames: int = 2) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        values = torch.rand(batch, frames, self.config.in_channels, *self.image_size, generator=g)
        label = torch.randint(2, (batch,), generator=g)
        return {"frames": values.to(self.device), "label": label.to(self.device), "id": [f"example {i}" for i in range(batch)]}

    def check_input(self, image: Any) -> None:
        check_tensor("frames", image, "frames channels height width", sizes={1: self.config.in_channels})
        self.check_size(*image.shape[2:])


def verdict(logits: Tensor) -> Verdict:
    """Logits [batch, frames, networks, 2] to the verdicts: each logit's sigmoid, the mean over all frames and networks, the higher class.

    `fake` is that mean for "fake" where it wins, and 1 minus the mean for "real" where that one does.
    """
    means = logits.sigmoid().mean((1, 2))  # b 2
    label = means.argmax(1)
    fake = torch.where(means[:, FAKE] > means[:, REAL], means[:, FAKE], (1 - means[:, REAL]).abs())
    shares = logits.softmax(-1).mean(2)  # b frames 2
    return Verdict(label, fake, shares.mean(1), shares[..., FAKE])
