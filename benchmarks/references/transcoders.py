"""The transcoder beside github.com/jacobdunefsky/transcoder_circuits: what it says, and a step of its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from formarium.engine.records import read_record
from formarium.nn.transcoder import Transcoder
from references import Pair, forward, importing

REPOSITORY = "jacobdunefsky/transcoder_circuits"
RECORD = Path(__file__).resolve().parents[2] / "tests" / "parity" / "transcoders" / "transcoders_gpt2_small.safetensors"


class HookedRootModule(nn.Module):
    """transformer_lens's, as much as theirs asks for."""

    def setup(self) -> None:
        pass


def pairs(clone: Path) -> Iterator[Pair]:
    hooks = {"HookedRootModule": HookedRootModule, "HookPoint": nn.Identity}
    with importing(clone, transformer_lens={}, transformer_lens__hook_points=hooks, jaxtyping={"Float": dict},
                   sae_training={"__path__": [str(clone / "sae_training")]}):  # fmt: skip
        from sae_training.sparse_autoencoder import SparseAutoencoder
    record = read_record(RECORD)
    said: dict[str, Any] = record.header["reference"]["constructor"]
    ours = Transcoder(said["d_in"], said["d_out"], said["d_sae"])
    theirs = SparseAutoencoder(SimpleNamespace(**said, dtype=torch.float32, device="cpu", is_sparse_connection=False, use_ghost_grads=True))
    for model in (ours, theirs):
        model.load_state_dict(record.state)
    x, target, l1 = torch.randn(256, said["d_in"]), torch.randn(256, said["d_out"]), said["l1_coefficient"]
    dead = torch.zeros(said["d_sae"], dtype=torch.bool)
    with torch.no_grad():
        same([*ours(x), ours.loss(x, target, l1, dead).total], theirs(x, dead, target)[:3])
    yield Pair("transcoder of GPT-2 small, 256 tokens", "forward", forward(ours, x), forward(theirs, x))
    yield Pair(
        "transcoder of GPT-2 small, 256 tokens",
        "train",
        step(ours, lambda: ours.loss(x, target, l1, dead).total, ours.drop_parallel_gradient, ours.unit_rows),
        step(theirs, lambda: theirs(x, dead, target)[2], theirs.remove_gradient_parallel_to_decoder_directions,
             theirs.set_decoder_norm_to_unit_norm),
    )  # fmt: skip


def step(model: Any, loss: Callable[[], Tensor], before: Callable[[], None], after: Callable[[], None]) -> Callable[[], Any]:
    """A step on the MLP's inputs and outputs; the decoder's rows keep their length."""
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-4, fused=True)

    def run() -> None:
        model.train()
        optimiser.zero_grad()
        loss().backward()
        before()
        optimiser.step()
        after()

    return run


def same(ours: Any, theirs: Any) -> None:
    for x, y in zip(ours, theirs, strict=True):
        if not torch.allclose(x, y, atol=1e-4 * float(y.abs().max())):
            raise SystemExit(f"the transcoder says something else than formarium's: {(x - y).abs().max():.2g}")
