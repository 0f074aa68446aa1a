"""What every motion generator shares: the batch it takes, its text condition, its prediction, its checks.

A batch holds
    motion   float32 [batch, frames, 263], HumanML3D's features (see skeleton.py), zeros after a motion's end   (training and evaluation)
    length   int64 [batch], frames of each motion, given or wanted
    caption  list[str], what the motion shows
    text     float32 [batch, text_dim], the captions' vectors, in place of the model's own text encoder (optional)
    group    list[str], which captions mean the same (optional)
    id       list[str]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Model
from formarium.tasks.motion_generation.text import word_vectors

TextEncoder = Callable[[Sequence[str]], Tensor]


class Motions(NamedTuple):
    """motion: float32 [batch, frames, 263], generated features, zeros after a motion's end. joints: float32 [batch, frames, 22, 3],
    metres, y up. length: int64 [batch]. reconstruction: float32 [batch, frames, 263], what the codes keep of the batch's motion ([batch,
    0, 263]
    without one)."""

    motion: Tensor
    joints: Tensor
    length: Tensor
    reconstruction: Tensor


class MotionGenerator(Model):
    """A generator of motions from captions. Config has `motion_dim`, `text_dim` and `max_length`.

    Captions become vectors by `text_encoder`: by default a sum of fixed random word vectors (text.word_vectors); a trained one, e.g.
    CLIP's, is given by `use_text_encoder`. Features are normalised by the mean and deviation that `study` finds in the training data.
    """

    task = "motion-generation"
    mean: Tensor
    std: Tensor

    def __init__(self, config: Any):
        super().__init__(config)
        self.__dict__["text_encoder"] = None
        self.register_buffer("mean", torch.zeros(config.motion_dim))
        self.register_buffer("std", torch.ones(config.motion_dim))
        self.preprocessing = {"max_length": config.max_length}

    def adopt(self, card: Any, variant: str, preprocessing: Mapping[str, Any]) -> None:
        super().adopt(card, variant, {**preprocessing, "max_length": self.config.max_length})

    def use_text_encoder(self, encoder: TextEncoder) -> MotionGenerator:
        """Take captions' vectors from this function, list of str -> float [captions, text_dim]; returns self. It isn't saved with the
        model."""
        found = encoder(["a person walks"])
        if not isinstance(found, Tensor) or found.shape != (1, self.config.text_dim):
            got = f"{[*found.shape]}" if isinstance(found, Tensor) else type(found).__name__
            raise BadInput("text encoder", expected=f"a function to float [captions, {self.config.text_dim}]", got=got)
        self.__dict__["text_encoder"] = encoder
        return self

    def text_of(self, batch: Batch) -> Tensor:
        """The captions' vectors, float [batch, text_dim]."""
        if "text" in batch:
            return batch["text"]
        if "caption" not in batch:
            raise BadInput("batch", expected="captions", got=f"only {', '.join(batch)}")
        if self.text_encoder is not None:
            return self.text_encoder(list(batch["caption"])).to(self.device).float()
        return torch.from_numpy(word_vectors(batch["caption"], self.config.text_dim)).to(self.device)

    def study(self, data: Any) -> None:
        """Mean and deviation of each feature over the training motions; the deviations of a kind (velocities, positions, rotations,
        contacts) are averaged, as HumanML3D does, so that still joints aren't blown up."""
        from formarium.tasks.motion_generation.skeleton import PARTS

        train = data.splits["train"]
        chosen = np.linspace(0, len(train) - 1, min(len(train), 2000)).round().astype(int)
        frames = np.concatenate([train[int(i)]["motion"] for i in chosen]).astype(np.float64)
        std = frames.std(0)
        for part in PARTS:
            std[part] = max(std[part].mean(), 1e-3)
        self.mean.copy_(torch.from_numpy(frames.mean(0)).float())
        self.std.copy_(torch.from_numpy(std).float())

    def normalised(self, batch: Batch) -> Tensor:
        """The batch's motion in units of deviations, float [batch, frames, motion_dim], zeros after each end."""
        motion = batch["motion"]
        if motion.ndim != 3 or motion.shape[-1] != self.config.motion_dim:
            raise BadInput("motion", expected=f"float [batch, frames, {self.config.motion_dim}]", got=f"{[*motion.shape]}")
        return (motion - self.mean) / self.std * within(batch["length"], motion.shape[1])[..., None]

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        """Motions of the sample data."""
        from formarium.tasks.motion_generation.data import Prepare, collate
        from formarium.tasks.motion_generation.sample import motions

        rng = np.random.default_rng(seed)
        prepare = Prepare({"max_length": self.config.max_length})
        found = collate([prepare(m, rng) for m in motions(rng, batch)])
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in found.items()}


def within(length: Tensor, frames: int) -> Tensor:
    """bool [batch, frames], true before each end."""
    return torch.arange(frames, device=length.device) < length[:, None]
