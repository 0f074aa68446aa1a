"""Mogo's motion tokeniser beside github.com/MiRECoFu/Mogo. Its transformer's sizes are fixed in the authors' class, beyond a quick run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from references import Pair, importing, recorded

REPOSITORY = "MiRECoFu/Mogo"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone):
        from models.vq.model import RVQVAE
    r = recorded("mogo", "mogo_rvqvae")
    args: dict[str, Any] = dict(r.constructor)
    quantisers = args.pop("num_quantizers")
    said = SimpleNamespace(num_quantizers=quantisers, shared_codebook=args.pop("shared_codebook"), quantize_dropout_prob=0.0, mu=0.99)
    cuda = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    try:
        theirs = RVQVAE(said, **args)
    finally:
        torch.Tensor.cuda = cuda  # type: ignore[method-assign]
    own = theirs.state_dict()
    theirs.load_state_dict({k: v for k, v in r.state.items() if k in own}, strict=False)
    for layer in theirs.quantizer.layers:
        layer.initted = True
    motion = torch.randn(4, 196, 263)

    def ours_says() -> Any:
        return r.ours.tokeniser.decode(r.ours.tokeniser.quantiser.lookup(r.ours.tokeniser.codes(motion)))

    def theirs_says() -> Any:
        codes, _ = theirs.encode(motion)
        return theirs.forward_decoder(codes)

    with torch.no_grad():
        a, b = (f() for f in (lambda: (r.ours.eval(), ours_says())[1], lambda: (theirs.eval(), theirs_says())[1]))
        if not torch.allclose(a, b, atol=1e-3):
            raise SystemExit(f"mogo_rvqvae says something else than formarium: {(a - b).abs().max():.2g}")
    yield Pair("mogo_rvqvae, 4 motions of 196 frames", "forward", forward_of(r.ours, ours_says), forward_of(theirs, theirs_says))


def forward_of(model: Any, says: Any) -> Any:
    model.eval()

    def run() -> Any:
        with torch.inference_mode():
            return says()

    return run
