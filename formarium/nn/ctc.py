"""Connectionist temporal classification (Graves et al. 2006): collapsing paths, greedy and prefix beam decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Score = Callable[[tuple[int, ...], int], float]  # (prefix, next token) -> log weight of that token


def collapse(path: Sequence[int], blank: int = 0) -> list[int]:
    """The labels that a path of frames stands for: repetitions merged, then blanks dropped."""
    return [t for i, t in enumerate(path) if t != blank and (i == 0 or t != path[i - 1])]


def greedy(log_probs: Tensor, lengths: Tensor, blank: int = 0) -> tuple[list[list[int]], Tensor]:
    """The labels of the likeliest path, and that path's log probability, float32 [batch].

    log_probs: float [batch, frames, tokens], log of probabilities. lengths: int64 [batch], frames that count.
    """
    best, path = log_probs.float().max(-1)
    inside = torch.arange(path.shape[1], device=path.device) < lengths[:, None]
    paths, sizes = path.tolist(), lengths.tolist()
    return [collapse(p[:n], blank) for p, n in zip(paths, sizes, strict=True)], (best * inside).sum(1)


def prefix_beam_search(
    log_probs: Tensor, lengths: Tensor, beam: int = 16, blank: int = 0, tokens: int = 24, score: Score | None = None
) -> tuple[list[list[int]], Tensor]:
    """The likeliest labels over all their paths, and their log probability, float32 [batch] (Hannun et al. 2014).

    beam: prefixes kept from frame to frame. tokens: how many of a frame's likeliest tokens may extend a prefix. score: added to the log
    probability of each extension, e.g. a language model's; without it a wide enough beam finds the exact maximum.
    Shapes as for `greedy`.
    """
    found = [
        _search(frames[:n], beam, blank, tokens, score) for frames, n in zip(log_probs.float().cpu().numpy(), lengths.tolist(), strict=True)
    ]
    return [list(labels) for labels, _ in found], torch.tensor([p for _, p in found], device=log_probs.device)


def _search(frames: np.ndarray, beam: int, blank: int, tokens: int, score: Score | None) -> tuple[tuple[int, ...], float]:
    # prefix -> log probability of its paths that end in a blank, and of those that end in its last token
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    count = min(tokens, frames.shape[1] - 1) if len(frames) else 0
    for frame in frames.astype(np.float64):
        likely = [t for t in np.argsort(-frame)[: count + 1].tolist() if t != blank]
        p = frame.tolist()
        following: dict[tuple[int, ...], list[float]] = {}
        for prefix, (ends_blank, ends_token) in beams.items():
            here = following.setdefault(prefix, [-math.inf, -math.inf])
            here[0] = _add(here[0], _add(ends_blank, ends_token) + p[blank])
            if prefix:
                here[1] = _add(here[1], ends_token + p[prefix[-1]])
            for token in likely:
                # a repeated token needs a blank before it
                before = ends_blank if prefix and token == prefix[-1] else _add(ends_blank, ends_token)
                if before == -math.inf:
                    continue
                bonus = score(prefix, token) if score else 0.0
                longer = following.setdefault((*prefix, token), [-math.inf, -math.inf])
                longer[1] = _add(longer[1], before + p[token] + bonus)
        best = sorted(following.items(), key=lambda kv: -_add(*kv[1]))[:beam]
        beams = {prefix: (a, b) for prefix, (a, b) in best}
    prefix, (a, b) = max(beams.items(), key=lambda kv: _add(*kv[1]))
    return prefix, _add(a, b)


def _add(a: float, b: float) -> float:
    """log(exp a + exp b)."""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))
