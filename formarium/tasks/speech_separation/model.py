"""What every speech separator shares: the batch it takes, its loss, its prediction, its checks.

A batch holds
    mixture   float32 [batch, samples], in [-1, 1], at the card's rate; recordings of one batch have one length
    sources   float32 [batch, speakers, samples], what each speaker says, in any order          (training and evaluation)
    rate      int64 [batch], samples a second
    notes     list[str], what was done to the sound before ("resampled from 44100 to 8000 Hz"), or ""
    id        list[str]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Losses, Model, check_tensor
from formarium.nn.separation import fit_levels, in_chunks, pit_si_sdr


class Voices(NamedTuple):
    """sources: float32 [batch, speakers, samples], at the levels that bring their sum nearest to the mixture."""

    sources: Tensor


class SpeechSeparator(Model):
    """A network from a mixture [batch, samples] to sources [batch, samples, speakers], trained for the best order of them.

    Config has at least `speakers` and `threshold`. The card's preprocessing has `rate` (hertz), and for long recordings `chunk` and
    `overlap` (seconds). Subclasses write `forward` and `shortest`.
    """

    task = "speech-separation"
    channel_axes = (None,)

    def __init__(self, config: Any):
        super().__init__(config)
        if config.speakers < 2:
            raise BadInput("speakers", expected="2 or more", got=str(config.speakers))
        self.preprocessing: dict[str, Any] = {"rate": 8000, "chunk": 10.0, "overlap": 2.5}

    @property
    def shortest(self) -> int:
        """The fewest samples it takes."""
        return 1

    def forward_batch(self, batch: Batch) -> Tensor:
        return self(batch["mixture"])

    def loss(self, batch: Batch) -> Losses:
        """Minus the SI-SDR in dB of the best order of speakers (permutation-invariant training over the utterance).

        Mixtures that are separated well already (loss below the config's `threshold`) are left out, unless all are.
        """
        ratio, _ = pit_si_sdr(self.forward_batch(batch).float().transpose(1, 2), batch["sources"])
        hard = -ratio > self.config.threshold
        keep = torch.where(hard.any(), hard, torch.ones_like(hard)).float()
        loss = -(ratio * keep).sum() / keep.sum()
        return Losses(loss, {"si_sdr": ratio.mean()})

    def predict(self, batch: Batch) -> Voices:
        """The speakers of each mixture; recordings longer than a chunk are worked through in overlapping ones, their order kept."""
        mixture, p = batch["mixture"], self.preprocessing
        chunk, overlap = (max(self.shortest, int(p.get(k, default) * p["rate"])) for k, default in (("chunk", 10.0), ("overlap", 2.5)))
        return Voices(in_chunks(self.separate, mixture, chunk, overlap))

    def separate(self, mixture: Tensor) -> Tensor:
        """A mixture [batch, samples] in one piece: sources [batch, speakers, samples], their levels fitted to it."""
        return fit_levels(self(mixture).float().transpose(1, 2), mixture.float())

    # examples and checks ----------------------------------------------------------------------------------------------

    def example(self, batch: int = 1, samples: int = 0) -> tuple[Tensor, ...]:
        return (0.3 * torch.randn(batch, samples or max(1600, 2 * self.shortest), device=self.device),)

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        return {f"{n} samples": self.example(2, n) for n in (self.shortest, 1001, 4000)} | {"one sample": self.example(1, 1)}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        n, count = max(2000, 2 * self.shortest), self.config.speakers
        time = torch.arange(n) / 8000
        pitch = 100 * (1 + torch.arange(count)[:, None]) * (1 + 0.3 * torch.rand(batch, count, 1, generator=g))
        sources = 0.2 * torch.sin(6.2832 * pitch * time) + 0.02 * torch.randn(batch, count, n, generator=g)
        made = {"mixture": sources.sum(1), "sources": sources, "rate": torch.full((batch,), 8000)}
        return {k: v.to(self.device) for k, v in made.items()} | {"notes": [""] * batch, "id": [f"example {i}" for i in range(batch)]}

    def check_input(self, mixture: Any) -> None:
        check_tensor("mixture", mixture, "batch samples")
        if mixture.shape[1] < self.shortest:
            raise BadInput("mixture", expected=f"at least {self.shortest} samples", got=str(mixture.shape[1]))
