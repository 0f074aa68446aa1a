"""Decoding token by token: beam search over groups of hypotheses, greedy and sampled decoding, and the cache of keys and values they
feed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# (newest token of every row int64 [rows], the row that each continues int64 [rows] or None at the start) -> logits [rows, vocabulary]
Step = Callable[[Tensor, Tensor | None], Tensor]


class KVCache:
    """Keys and values of the tokens decoded so far, float [rows, heads, length, width], in storage that doubles when it is full."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest tokens' k, v [rows, heads, new, width]; returns all keys and values, oldest first."""
        end = self.length + k.shape[2]
        if self._keys is None or end > self._keys.shape[2]:
            self._keys, self._values = self._grown(self._keys, k, 2 * end), self._grown(self._values, v, 2 * end)
        assert self._values is not None
        self._keys[:, :, self.length : end] = k
        self._values[:, :, self.length : end] = v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Row i continues row rows[i]."""
        if self._keys is None or self._values is None:
            return
        self._keys[:, :, : self.length] = self._keys[rows, :, : self.length]
        self._values[:, :, : self.length] = self._values[rows, :, : self.length]

    def _grown(self, old: Tensor | None, new: Tensor, size: int) -> Tensor:
        room = new.new_zeros(*new.shape[:2], size, new.shape[3])
        if old is not None:
            room[:, :, : self.length] = old[:, :, : self.length]
        return room


class Beams(NamedTuple):
    """The best hypotheses of every group, best first.

    tokens: int64 [groups, beams, length], without start and end symbols, padded. lengths: int64 [groups, beams].
    scores: float [groups, beams], sum of log-probabilities / (length with the start symbol) ** alpha.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor


@torch.no_grad()
def beam_search(
    step: Step,
    start: Tensor,
    end: Tensor,
    *,
    beams: int,
    max_len: int,
    alpha: float = 1.0,
    early_stopping: bool = False,
    temperature: float = 1.0,
    pad: int = 0,
) -> Beams:
    """Keep the `beams` likeliest hypotheses of every group, all groups at once.

    start, end: int64 [groups], the symbols that open and close a group's sequences. step: see Step; rows are group-major, groups * beams.
    max_len: of a sequence with its start symbol. alpha: exponent of the length that scores are divided by.
    A group stops when it has `beams` finished hypotheses and (unless early_stopping) no open one is better than the worst of them, each at
    its present length. At max_len the open ones count as finished.
    """
    groups, device = len(start), start.device
    live = torch.full((groups, beams, max_len), pad, dtype=torch.int64, device=device)
    live[..., 0] = start[:, None]
    score = torch.full((groups, beams), -torch.inf, device=device)
    score[:, 0] = 0.0  # at first all rows are the same one
    kept, kept_lengths = live.clone(), torch.ones(groups, beams, dtype=torch.int64, device=device)
    kept_score = torch.full_like(score, -torch.inf)
    done = torch.zeros(groups, dtype=torch.bool, device=device)
    rank = torch.arange(2 * beams, device=device)
    first_row = torch.arange(groups, device=device)[:, None] * beams
    token, parents, length = live[..., 0].flatten(), None, 1

    def keep(sequences: Tensor, scores: Tensor, now: int) -> None:
        nonlocal kept, kept_lengths, kept_score
        kept_score, best = torch.cat([kept_score, scores], 1).topk(beams)
        kept = torch.cat([kept, sequences], 1).gather(1, best[..., None].expand(-1, -1, max_len))
        kept_lengths = torch.cat([kept_lengths, torch.full_like(scores, now, dtype=torch.int64)], 1).gather(1, best)

    while length < max_len and not bool(done.all()):
        logp = (step(token, parents).float() / temperature).log_softmax(-1).view(groups, beams, -1)
        total, flat = (logp + score[..., None]).flatten(1).topk(2 * beams)  # g 2m
        parent, symbol = flat // logp.shape[-1], flat % logp.shape[-1]
        ended = symbol == end[:, None]
        grown = live.gather(1, parent[..., None].expand(-1, -1, max_len))
        counts = ended & (rank < beams) & ~done[:, None]  # only what ends among the best `beams` is a hypothesis
        keep(grown, (total / length**alpha).masked_fill(~counts, -torch.inf), length)
        going = ended.int().argsort(dim=1, stable=True)[:, :beams]  # the best that go on
        score, parent, symbol = total.gather(1, going), parent.gather(1, going), symbol.gather(1, going)
        symbol = symbol.masked_fill(done[:, None], pad)
        live = grown.gather(1, going[..., None].expand(-1, -1, max_len))
        live[..., length] = symbol
        full = kept_score[:, -1] > -torch.inf
        done = done | (full & (early_stopping | (kept_score[:, -1] >= score.amax(1) / length**alpha)))
        token, parents, length = symbol.flatten(), (first_row + parent).flatten(), length + 1
    keep(live, (score / length**alpha).masked_fill(done[:, None], -torch.inf), length)
    return Beams(kept[..., 1:], kept_lengths - 1, kept_score)


@torch.no_grad()
def decode(
    step: Step, start: Tensor, end: Tensor, *, max_len: int, temperature: float | None = None, pad: int = 0
) -> tuple[Tensor, Tensor]:
    """The likeliest token at every step (or one drawn at a temperature), until all rows have ended or are max_len long.

    start, end: int64 [rows]. Returns (int64 [rows, length] without start and end symbols, padded; int64 [rows] lengths).
    """
    rows, token = len(start), start
    out: list[Tensor] = []
    done = torch.zeros(rows, dtype=torch.bool, device=start.device)
    lengths = torch.zeros(rows, dtype=torch.int64, device=start.device)
    parents = None
    while len(out) < max_len - 1 and not bool(done.all()):
        logits = step(token, parents).float()
        drawn = None if temperature is None else torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        token = logits.argmax(-1) if drawn is None else drawn
        done = done | (token == end)
        token = token.masked_fill(done, pad)
        lengths += (~done).long()
        out.append(token)
        parents = torch.arange(rows, device=start.device)
    return torch.stack(out, 1) if out else start.new_zeros(rows, 0), lengths
