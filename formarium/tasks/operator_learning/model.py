"""What every operator learner shares: the batch it takes, its prediction, its checks.

A batch holds
    data       float32 [batch, steps, 1 + dims], observed samples: time, then the state (0 in dimensions a system lacks)
    observed   bool [batch, steps], False for padding behind shorter observations
    query      float32 [batch, times], when the solution is asked for
    dims       bool [batch, dims], True for the dimensions a system has
    guess      a list of prefix words a sample (`symbols.py`): a guess of its equations, numbers as <PLACEHOLDER>
    target     float32 [batch, times, dims], the solution there                              (training and evaluation)
    words      a list of prefix words a sample: its equations, [] where unknown               (training and evaluation)
    id         list of strings
or, in place of guess and words, their ids: skeleton and equation int64 [batch, words], equation between <BOS> and <EOS>, 2 (<PAD>) behind.
With a PDE's field in place of a state, dims channels are grid * dims channels, the dimensions fastest.
Times and states are in the data's own units.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.model import Batch, Model
from formarium.tasks.operator_learning.symbols import BOS, EOS, PAD, to_ids


class Solutions(NamedTuple):
    """solution: float32 [batch, times, dims]. words: a list of prefix words a sample ([] where the model writes no equations).
    equation: the same for a person. valid: whether they are equations of as many dimensions as the sample has."""

    solution: Tensor
    words: list[list[str]]
    equation: list[str]
    valid: list[bool]


class OperatorLearner(Model):
    """Observed samples and a guess of the equations to the solution elsewhere and the equations. Config has at least `vocabulary`,
    `dims`."""

    task = "operator-learning"

    def prepared(self, batch: Batch, equation: bool = True) -> Batch:
        """The batch with ids of the model's own vocabulary, and states of as many dimensions as it has. BadInput for an unknown symbol."""
        out, own = dict(batch), self.config
        device, missing = batch["data"].device, own.dims - batch["dims"].shape[1]
        if missing > 0 and not getattr(own, "grid", 0):
            out |= {k: F.pad(batch[k], (0, missing)) for k in ("data", "dims", "target") if k in batch}
        names = batch.get("id") or [f"sample {i}" for i in range(len(batch["data"]))]
        if "skeleton" not in out:
            rows = [to_ids(w, own.vocabulary, f"{n}: guess") for w, n in zip(batch["guess"], names, strict=True)]
            out["skeleton"] = pad_rows(rows).to(device)
        if equation and "equation" not in out:
            known = batch.get("words") or [[]] * len(names)
            rows = [[BOS, *to_ids(w, own.vocabulary, f"{n}: equation"), EOS] if w else [] for w, n in zip(known, names, strict=True)]
            out["equation"] = pad_rows(rows).to(device)
        return out


def pad_rows(rows: list[list[int]]) -> Tensor:
    """int64 [rows, longest, at least 1], padded with <PAD>."""
    out = torch.full((len(rows), max(1, *map(len, rows))), PAD, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return out
