"""Mogo's motion tokeniser and its transformer beside github.com/MiRECoFu/Mogo.

The transformer's sizes stand as numbers in the authors' class (42 layers, 1024 wide); they are changed as the class is read, to those of
the parity record. CLIP is left out on both sides: captions come as its vectors.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from references import Pair, Recorded, calling, forward, importing, on_cpu, recorded, step

REPOSITORY = "MiRECoFu/Mogo"


def pairs(clone: Path) -> Iterator[Pair]:
    yield from tokeniser(clone)
    yield from transformer(clone)


def tokeniser(clone: Path) -> Iterator[Pair]:
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


STUBS: dict[str, Any] = {
    "clip": {},
    "einops_exts": {"rearrange_with_anon_dims": lambda x, *a, **k: x},  # of one batch dimension, it changes nothing
    "seaborn": {},
    "models__transformers__token_embedding": {},
}


def transformer(clone: Path) -> Iterator[Pair]:
    r = recorded("mogo", "mogo_small")
    theirs = made(clone, r)
    r.same(theirs, other=lambda: theirs.eval()(*r.inputs, None, r.inputs[1], is_generating=True))
    c = r.ours.config
    text, codes, length = torch.randn(4, c.text_dim), torch.randint(0, c.codes, (4, 196, c.quantisers)), torch.tensor([196, 160, 120, 80])
    yield Pair("mogo_small, 4 motions of 196 steps", "forward", forward(r.ours, text, codes),
               forward(theirs, text, codes, length, codes, (), True))  # fmt: skip
    r.ours.__dict__["borrowed"] = SimpleNamespace(tokeniser=SimpleNamespace(codes=lambda motion: codes))  # both are given the codes
    batch = {"motion": torch.zeros(4, 196, c.motion_dim), "length": length, "text": text}
    yield Pair(
        "mogo_small, 4 motions of 196 steps",
        "train",
        step(r.ours, lambda: r.ours.transformer_loss(batch).total),
        step(theirs, lambda: theirs(text, codes, length, codes)[0]),
    )
    steps = 40
    theirs.vq_model = SimpleNamespace(forward_decoder=lambda said: said)

    def speaks() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # it shows its codes
            return theirs.generate(text, torch.full((4,), steps), codes)

    yield Pair(f"mogo_small, {steps} steps of 4 motions said", "forward", calling(r.ours, lambda: list(r.ours.stream(text, steps))), speaks)


def made(clone: Path, r: Recorded) -> nn.Module:
    c = r.constructor
    path = clone / "models" / "transformers" / "transformotion.py"
    source = path.read_text(encoding="utf-8")
    for number, other in (
        ("decoder_xl_dim = 1024", f"decoder_xl_dim = {c['decoder_xl_dim']}"),
        ("[18, 10, 6, 4, 2, 2]", str(c["layer_list"])),
    ):
        if number not in source:
            raise SystemExit(f"{path} doesn't say {number} any more")
        source = source.replace(number, other)
    module = ModuleType("transformotion")
    with importing(clone, **STUBS), mock.patch.object(torch.version, "cuda", "0.0"):
        exec(compile(source, str(path), "exec"), module.__dict__)

    class WithoutClip(module.Transformotion):  # type: ignore[name-defined]
        def load_and_freeze_clip(self, version: Any) -> None:
            return None

        def encode_text(self, text: Tensor) -> Tensor:
            return text

    opt = SimpleNamespace(device="cpu", num_tokens=c["num_tokens"], num_quantizers=c["num_quantizers"])
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its arguments
        return WithoutClip(c["num_tokens"], None, clip_dim=c["clip_dim"], num_heads=c["num_heads"], opt=opt)
