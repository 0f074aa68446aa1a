"""PROSE (for ODEs) beside github.com/felix-lyx/prose: their modules as their trainer wires them, with its two losses."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from formarium.authors.prose import call
from formarium.tasks.operator_learning.symbols import BOS, EOS, PAD
from references import Pair, calling, forward, importing, recorded, step

REPOSITORY = "felix-lyx/prose"
TABLES, SAMPLES, QUERIES, WORDS = 4, 64, 64, 48


class Theirs(nn.Module):
    """Their modules in their trainer's order. Tensors are length first."""

    def __init__(self, modules: dict[str, nn.Module]):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, data: Tensor, data_len: Tensor, text: Tensor, text_len: Tensor, query: Tensor, target: Tensor, target_len: Tensor):
        x = self.data_encoder("fwd", x=self.embedder(data), lengths=data_len, causal=False)
        y = self.text_encoder("fwd", x=text, lengths=text_len, causal=False)
        fused = self.fusion("fwd", x_data=x, x_text=y, lengths_data=data_len, lengths_text=text_len, causal=False)
        source, lengths = fused.transpose(0, 1), (data_len, text_len)
        asked = self.data_decoder("query_emb", query_times=query)
        x = self.data_decoder("fwd", query_emb=asked, src_enc=source, src_len=lengths)
        y = self.text_decoder("fwd", x=target, lengths=target_len, causal=True, src_enc=source, src_len=lengths)
        return x, y


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone / "prose_ode"):
        from symbolicregression.model import build_modules
    r = recorded("prose", "prose_ode")
    words = {i: f"word{i}" for i in range(r.constructor["n_words"])} | {BOS: "<BOS>", EOS: "<EOS>", PAD: "<PAD>"}
    more = {"reload_model": "", "cpu": True, "compile": False, "data_only": False, "text_only": False}
    theirs = Theirs(build_modules(SimpleNamespace(equation_id2word=words), Namespace(**r.constructor, **more)))
    given = dict(zip(("data", "data_len", "text", "text_len", "query_times", "target", "target_len"), r.inputs, strict=True))
    r.same(theirs, lambda: _said(call(r.ours.eval(), given, {})), lambda: _heads(theirs, *theirs.eval()(*r.inputs)))

    dims, count = r.constructor["max_output_dimension"], len(words)
    data, query, values = torch.randn(TABLES, SAMPLES, 1 + dims), torch.linspace(2, 4, QUERIES), torch.randn(TABLES, QUERIES, dims)
    skeleton, equation = torch.randint(4, count, (TABLES, WORDS)), torch.randint(4, count, (TABLES, WORDS))
    equation[:, 0], equation[:, -1] = BOS, EOS
    observed = torch.ones(TABLES, SAMPLES, dtype=torch.bool)
    times = query.expand(TABLES, -1)
    batch = {"data": data, "observed": observed, "skeleton": skeleton, "query": times, "equation": equation, "target": values}
    batch["dims"] = torch.ones(TABLES, dims, dtype=torch.bool)
    full = {n: torch.full((TABLES,), n) for n in (SAMPLES, WORDS)}
    inputs = (data.transpose(0, 1), full[SAMPLES], skeleton.T, full[WORDS], query, equation.T, full[WORDS])

    there, every = torch.ones(QUERIES, TABLES, dims, dtype=torch.bool), torch.ones(WORDS, TABLES, dtype=torch.bool)
    every[-1] = False
    weight = (1 / (values.flatten(1).square().sum(1) + 1e-5) / TABLES)[None, :, None].expand(QUERIES, -1, dims)[there]

    def their_loss() -> Tensor:
        x, y = theirs(*inputs)
        _, of_data = theirs.data_decoder("predict", tensor=x, pred_mask=there, y=values.transpose(0, 1)[there], weight=weight)
        _, of_text = theirs.text_decoder("predict", tensor=y, pred_mask=every, y=equation.T[1:].flatten(), get_scores=False)
        return 6 * of_data + of_text

    their_forward = calling(theirs, lambda: _heads(theirs, *theirs(*inputs)))
    name = f"prose_ode, {TABLES} of {SAMPLES} samples and {WORDS} words"
    with torch.no_grad():
        mine, other = float(r.ours.eval().loss(batch).total), float(their_loss())
        if abs(mine - other) > 1e-3 * mine:
            raise SystemExit("PROSE's loss says something else than formarium")
    yield Pair(name, "forward", forward(r.ours, data, observed, skeleton, times, equation), their_forward)
    yield Pair(name, "train", step(r.ours, lambda: r.ours.loss(batch).total), step(theirs, their_loss))


def _said(out: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return out["data"], out["logits"]


def _heads(theirs: Theirs, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return theirs.data_decoder.proj(x), theirs.text_decoder.proj(y)
