"""PROSE-FD beside github.com/felix-lyx/prose (prose_fd)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from formarium.authors.prose_fd import call
from formarium.tasks.operator_learning.symbols import SPECIAL
from references import Pair, both, importing, recorded

REPOSITORY, NEEDS = "felix-lyx/prose", ("einops",)
FRAMES, LENGTH, WORDS = 10, 3, 48  # of the table, of what is timed


class Settings(dict[str, Any]):
    """A table whose entries are attributes, too, as Hydra's are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def settings(table: Any) -> Any:
    return Settings({k: settings(v) for k, v in table.items()}) if isinstance(table, dict) else table


class Theirs(nn.Module):
    """With our order of inputs; times of what is asked for count from the last frame given."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, fields: Any, times: Any, words: Any, asked: Any) -> Any:
        later = asked - times[:, -1:]
        return self.model("fwd", data_input=fields, input_times=times[..., None], output_times=later[..., None], symbol_input=words)


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone / "prose_fd", rotary_embedding_torch={"RotaryEmbedding": nn.Identity}):
        from models.transformer_wrappers import PROSE_2to1
    r = recorded("prose_fd", "prose_fd")
    c = settings(r.constructor)
    words = SimpleNamespace(equation_id2word={i: f"word{i}" for i in range(c.n_words)} | dict(enumerate(SPECIAL)))
    theirs = PROSE_2to1(c, words, c.x_num, c.max_output_dimension, FRAMES)
    names = ("data_input", "input_times", "output_times", "symbol_input", "symbol_padding_mask")
    given = dict(zip(names, r.inputs, strict=False))
    r.same(theirs, lambda: call(r.ours.eval(), given, {}), lambda: theirs.eval()("fwd", **given))
    fields, times = torch.randn(1, LENGTH, c.x_num, c.x_num, c.max_output_dimension), torch.arange(2.0 * LENGTH)[None]
    inputs = (fields, times[:, :LENGTH], torch.randint(4, c.n_words, (1, WORDS)), times[:, LENGTH:])
    yield from both(f"prose_fd, a film of {LENGTH} + {LENGTH} frames", r.ours, Theirs(theirs), *inputs)
