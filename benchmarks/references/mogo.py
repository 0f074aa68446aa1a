"""Mogo's motion tokeniser beside github.com/MiRECoFu/Mogo. Its transformer's sizes are fixed in the authors' class, beyond a quick run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from references import Pair, calling, importing, on_cpu, recorded

REPOSITORY = "MiRECoFu/Mogo"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone):
        from models.vq.model import RVQVAE
    r = recorded("mogo", "mogo_rvqvae")
    args: dict[str, Any] = dict(r.constructor)
    quantisers = args.pop("num_quantizers")
    said = SimpleNamespace(num_quantizers=quantisers, shared_codebook=args.pop("shared_codebook"), quantize_dropout_prob=0.0, mu=0.99)
    with on_cpu():
        theirs = RVQVAE(said, **args)
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

    ours, other = calling(r.ours, ours_says), calling(theirs, theirs_says)
    a, b = ours(), other()
    if not torch.allclose(a, b, atol=1e-3):
        raise SystemExit(f"mogo_rvqvae says something else than formarium: {(a - b).abs().max():.2g}")
    yield Pair("mogo_rvqvae, 4 motions of 196 frames", "forward", ours, other)
