"""What every speech recogniser shares: the batch it takes, its loss, its prediction, its checks.

A batch holds
    features      float32 [batch, frames, mels], log-mel of each utterance, mean 0 and variance 1 over it, zero behind its end
    length        int64 [batch], frames of each utterance
    seconds       float32 [batch], how long each utterance is
    tokens        int64 [batch, most], the transcript's tokens (1 ...), 0 behind its end         (training and evaluation)
    token_length  int64 [batch]                                                                  (training and evaluation)
    text          list[str], the transcript                                                      (training and evaluation)
    notes         list[str], what was done to the sound before ("resampled from 44100 to 16000 Hz"), or ""
    id            list[str]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Losses, Model, check_tensor
from formarium.nn.ctc import greedy, prefix_beam_search
from formarium.tasks.speech_recognition.vocabulary import decode, symbols_of


class Transcripts(NamedTuple):
    """text: list[str]. tokens: list[list[int]], without blanks. log_probability: float32 [batch], of the path (greedy) or of all paths of
    the text (beam). emissions: float32 [batch, output frames, vocabulary], probabilities. frames: int64 [batch], how many of them count."""

    text: list[str]
    tokens: list[list[int]]
    log_probability: Tensor
    emissions: Tensor
    frames: Tensor


class SpeechRecogniser(Model):
    """A network trained with CTC (token 0 is the blank).

    Config has at least `mels`, `vocabulary_size`, `vocabulary` (its symbols, or none) and `beam`. `forward` takes features and lengths as
    in the batch and returns logits [batch, output frames, vocabulary]. Subclasses write `forward`, `output_length` and `shortest`.
    """

    task = "speech-recognition"
    channel_axes = (2, None)

    def __init__(self, config: Any):
        super().__init__(config)
        size, given = config.vocabulary_size, config.vocabulary
        if given and len(given) != size:
            raise BadInput("vocabulary", expected=f"{size} symbols (vocabulary_size)", got=str(len(given)))
        if config.beam < 1:
            raise BadInput("beam", expected="1 (greedy) or more", got=str(config.beam))
        self.preprocessing: dict[str, Any] = {"mels": config.mels}

    def output_length(self, length: Tensor, frames: int) -> Tensor:
        """How many of the output's frames stand for an utterance of `length` features in a batch of `frames`, int64 [batch]."""
        raise NotImplementedError

    @property
    def shortest(self) -> int:
        """The fewest feature frames it takes."""
        return 1

    @property
    def symbols(self) -> tuple[str, ...]:
        return symbols_of(self.config.vocabulary_size, self.config.vocabulary)

    def forward_batch(self, batch: Batch) -> Tensor:
        return self(batch["features"], batch["length"])

    def loss(self, batch: Batch) -> Losses:
        """CTC: minus the log probability of the transcript, summed over all its paths; the mean over utterances.

        An utterance too short for its transcript, which no path can spell, counts nothing.
        """
        logits = self.forward_batch(batch)
        frames = self.output_length(batch["length"], batch["features"].shape[1])
        log_probs = logits.float().log_softmax(-1).transpose(0, 1)  # t b v
        each = F.ctc_loss(log_probs, batch["tokens"], frames, batch["token_length"], blank=0, reduction="none", zero_infinity=True)
        loss = each.mean()
        return Losses(loss, {"ctc": loss})

    def predict(self, batch: Batch) -> Transcripts:
        """Transcripts by greedy decoding, or by prefix beam search where the config's `beam` is more than 1."""
        log_probs = self.forward_batch(batch).float().log_softmax(-1)
        frames = self.output_length(batch["length"], batch["features"].shape[1])
        beam = self.config.beam
        tokens, score = greedy(log_probs, frames) if beam == 1 else prefix_beam_search(log_probs, frames, beam)
        symbols = self.symbols
        return Transcripts([decode(t, symbols) for t in tokens], tokens, score.float(), log_probs.exp(), frames)

    # examples and checks ----------------------------------------------------------------------------------------------

    def example(self, batch: int = 1, frames: int = 0) -> tuple[Tensor, ...]:
        frames = frames or max(64, 2 * self.shortest)
        length = torch.full((batch,), frames, device=self.device)
        length[1::2] -= 5
        return torch.randn(batch, frames, self.config.mels, device=self.device), length

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        return {f"{n} frames": self.example(2, n) for n in (self.shortest + 5, 97, 203)} | {"one frame": self._one_frame()}

    def _one_frame(self) -> tuple[Tensor, ...]:
        return torch.randn(1, 1, self.config.mels, device=self.device), torch.ones(1, dtype=torch.int64, device=self.device)

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        frames, size = max(96, 2 * self.shortest), self.config.vocabulary_size
        tokens = torch.randint(1, size, (batch, 6), generator=g)
        features = torch.randn(batch, frames, self.config.mels, generator=g)
        length = torch.full((batch,), frames)
        made = {
            "features": features, "length": length, "tokens": tokens, "token_length": torch.full((batch,), 6),
            "seconds": length / 100,
        }  # fmt: skip
        words = {"text": [decode(t, self.symbols) for t in tokens.tolist()], "notes": [""] * batch}
        return {k: v.to(self.device) for k, v in made.items()} | words | {"id": [f"example {i}" for i in range(batch)]}

    def check_input(self, features: Any, length: Any) -> None:
        check_tensor("features", features, "batch frames mels", sizes={2: self.config.mels})
        integral = lambda d: d in (torch.int32, torch.int64)  # noqa: E731
        check_tensor("length", length, "batch", sizes={0: features.shape[0]}, dtype=integral)
        if features.shape[1] < self.shortest:
            raise BadInput("features", expected=f"at least {self.shortest} frames", got=str(features.shape[1]))
        if length.device.type == "cpu" and not (int(length.min()) >= 1 and int(length.max()) <= features.shape[1]):
            raise BadInput("length", expected=f"from 1 to {features.shape[1]}, the frames there are", got=f"{length.tolist()}")
