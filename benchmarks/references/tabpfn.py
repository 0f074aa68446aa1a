"""TabPFN (version 1) beside github.com/automl/TabPFN."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Optional
from unittest.mock import patch

import torch
from torch import nn

from references import Pair, forward, importing, recorded, squares, step

REPOSITORY = "automl/TabPFN"
ROWS, CONTEXT, TABLES = 512, 384, 1


def pairs(clone: Path) -> Iterator[Pair]:
    package = {"__path__": [str(clone / "tabpfn")]}  # without its __init__, which imports the whole interface
    old = patch.object(torch.nn.modules.transformer, "Optional", Optional, create=True)  # a name that torch no longer has there
    with importing(clone, tabpfn=package, tabpfn__utils={}), old:
        from tabpfn.transformer import TransformerModel
    r = recorded("tabpfn", "tabpfn_released")
    c = r.constructor
    theirs = TransformerModel(
        nn.Linear(c["num_features"], c["emsize"]), c["n_out"], c["emsize"], c["nhead"], c["nhid"], c["nlayers"],
        y_encoder=nn.Linear(1, c["emsize"]), efficient_eval_masking=c["efficient_eval_masking"],
    )  # fmt: skip
    x, y = r.inputs
    r.same(
        theirs,
        lambda: r.ours.eval()(x.transpose(0, 1), y.transpose(0, 1), torch.full((x.shape[1],), 20))[:, 20:].transpose(0, 1),
        lambda: theirs.eval()((x, y), single_eval_pos=20),
    )
    x, y = torch.randn(ROWS, TABLES, c["num_features"]), torch.randint(0, 10, (ROWS, TABLES)).float()
    rows = x.transpose(0, 1).contiguous(), y.transpose(0, 1).contiguous(), torch.full((TABLES,), CONTEXT)

    def their_loss() -> torch.Tensor:
        return squares(theirs((x, y), single_eval_pos=CONTEXT))

    name = f"tabpfn_released, a table of {CONTEXT} + {ROWS - CONTEXT} rows"
    yield Pair(name, "forward", forward(r.ours, *rows), forward(_Called(theirs), x, y))
    yield Pair(name, "train", step(r.ours, lambda: squares(r.ours(*rows)[:, CONTEXT:])), step(theirs, their_loss))


class _Called(nn.Module):
    """Theirs with its cut."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.model((x, y), single_eval_pos=CONTEXT)
