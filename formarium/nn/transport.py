"""Optimal transport between two small sets with a bin for what has no partner (SuperGlue, Sarlin et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor


def log_transport(scores: Tensor, rows: Tensor, columns: Tensor, bin_score: Tensor, iterations: int) -> Tensor:
    """Log of the transport plan by Sinkhorn's iterations.

    scores: float [b, m, n]; rows, columns: bool [b, m], [b, n], which are real; bin_score: a scalar, what leaving something alone is worth.
    Every real row and column has mass 1 and the bins have room for all of the other side, so that entries are probabilities. Returns
    [b, m + 1, n + 1]; entries of what isn't real are about -1e6.
    """
    hidden = -1e6
    b, m, n = scores.shape
    scores = scores.float()
    scores = torch.cat([scores, bin_score.expand(b, m, 1)], 2)
    scores = torch.cat([scores, bin_score.expand(b, 1, n + 1)], 1)
    yes = torch.ones(b, 1, dtype=torch.bool, device=scores.device)
    rows_, columns_ = torch.cat([rows, yes], 1), torch.cat([columns, yes], 1)
    scores = scores.masked_fill(~(rows_[:, :, None] & columns_[:, None]), hidden)
    some_rows, some_columns = rows.sum(1).float(), columns.sum(1).float()
    norm = -(some_rows + some_columns).log()[:, None]  # b 1
    mu = torch.cat([norm.expand(b, m), some_columns.log()[:, None] + norm], 1).masked_fill(~rows_, hidden)
    nu = torch.cat([norm.expand(b, n), some_rows.log()[:, None] + norm], 1).masked_fill(~columns_, hidden)
    u, v = torch.zeros_like(mu), torch.zeros_like(nu)
    for _ in range(iterations):
        u = mu - (scores + v[:, None]).logsumexp(2)
        v = nu - (scores + u[:, :, None]).logsumexp(1)
    return scores + u[:, :, None] + v[:, None] - norm[:, :, None]
