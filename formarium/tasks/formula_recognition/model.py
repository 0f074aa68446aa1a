"""What every formula recogniser shares: the batch it takes, its prediction, its checks.

A batch holds
    image   float32 [batch, 1, height, width], ink 1 on paper 0, smaller images at the top left, zeros around them
    mask    bool [batch, height, width], True where there is no image
    tokens  int64 [batch, length], ids of `latex.py` (vocabulary place + 3) without start and end, 0 behind them   (training, evaluation)
    id      list of strings
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Model
from formarium.tasks.formula_recognition.latex import EOS, PAD, SOS, to_ids, to_tokens, tokenize


class Formulas(NamedTuple):
    """tokens: a list of words a sample. latex: the same as one string. score: float32 [batch], higher is surer. ids: a list of ids a
    sample."""

    tokens: list[list[str]]
    latex: list[str]
    score: Tensor
    ids: list[list[int]]


class FormulaRecogniser(Model):
    """An image to a token sequence. Config has at least `vocabulary`, a tuple of words (ids begin behind the three special ones)."""

    task = "formula-recognition"

    @property
    def structure(self) -> dict[str, int]:
        """Ids of the words that lay a formula out, -1 where the vocabulary lacks one."""
        own = {w: i + 3 for i, w in enumerate(self.config.vocabulary)}
        return {w: own.get(w, -1) for w in ("^", "_", "{", "}", "[", "]", r"\frac", r"\sqrt")}

    def formulas(self, ids: list[list[int]], score: Tensor) -> Formulas:
        tokens = [to_tokens(row, self.config.vocabulary) for row in ids]
        return Formulas(tokens, [" ".join(t) for t in tokens], score, ids)

    def example_formulas(self, batch: int) -> Tensor:
        """Token rows int64 [batch, length] of small formulas, as far as the vocabulary goes."""
        texts = ("x ^ { 2 } + y", r"\frac { 1 } { y }", "y + 2", r"\sqrt { x } + 1")
        known = {*self.config.vocabulary}
        usable = [t for t in texts if {*tokenize(t)} <= known] or [" ".join(self.config.vocabulary[-1:])]
        rows = [to_ids(tokenize(usable[i % len(usable)]), self.config.vocabulary) for i in range(batch)]
        return pad_rows(rows)

    def check_image(self, image: Any, mask: Any) -> None:
        from formarium.model import check_tensor

        check_tensor("image", image, "batch 1 height width", sizes={1: 1})
        check_tensor("mask", mask, "batch height width", dtype=lambda d: d == torch.bool)
        if mask.shape != (image.shape[0], *image.shape[2:]):
            raise BadInput("mask", expected=f"the image's {[image.shape[0], *image.shape[2:]]}", got=f"{[*mask.shape]}")


def pad_rows(rows: list[list[int]]) -> Tensor:
    """int64 [rows, longest], padded with 0."""
    out = torch.full((len(rows), max(map(len, rows), default=0)), PAD, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return out


def bidirectional(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Teacher-forced rows and their targets, both int64 [batch, 2, length + 1]: [:, 0] from left to right, [:, 1] from right to left.

    tokens: int64 [batch, length], padded with 0. The right-to-left row starts with the end symbol and ends in the start symbol.
    """
    b, n = tokens.shape
    lengths = (tokens != PAD).sum(1)
    place = torch.arange(n, device=tokens.device)
    backward = torch.where(place < lengths[:, None], tokens.gather(1, (lengths[:, None] - 1 - place).clamp_min(0)), PAD)
    words = torch.stack([tokens, backward], 1)  # b 2 n
    edges = torch.tensor([SOS, EOS], device=tokens.device).expand(b, 2)
    rows = torch.cat([edges[..., None], words], 2)
    targets = torch.cat([words, words.new_zeros(b, 2, 1)], 2).scatter(2, lengths[:, None, None].expand(b, 2, 1), edges.flip(1)[..., None])
    return rows, targets


def image_batch(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch["image"], batch["mask"]
