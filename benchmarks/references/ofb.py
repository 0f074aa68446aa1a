"""OFB's search beside github.com/HankYe/Once-for-Both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from formarium.methods.ofb import masked_tokens, reconstruction_loss
from references import TIMM, Pair, forward, importing, recorded, squares, step

REPOSITORY = "HankYe/Once-for-Both"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone, **TIMM, matplotlib={}, matplotlib__pyplot={}):
        from models.layers import ModuleInjection
        from models.vision_transformer import MIMVisionTransformer
    ModuleInjection.method = "search"
    r = recorded("ofb", "ofb_deit_small_search")
    norm = partial(nn.LayerNorm, eps=r.constructor.pop("norm_eps"))
    keep, (x, noise) = r.constructor["mask_ratio"], r.inputs
    ours, theirs = r.ours, MIMVisionTransformer(**r.constructor, norm_layer=norm)
    theirs.searchable_modules = ModuleInjection.searchable_modules
    ours.set_w(0.5)
    for module in theirs.searchable_modules:
        module.w_p = 0.5

    def our_loss(x: Tensor, noise: Tensor) -> Tensor:
        masked = masked_tokens(noise, keep)
        logits, painted = ours.search(x, masked)
        paint = reconstruction_loss(x, painted, masked.unflatten(1, ours._token_grid(x)))
        return squares(logits) + paint + sum(ours.one_hot_losses().values()) + ours.budget_loss()

    def their_loss(x: Tensor, noise: Tensor) -> Tensor:
        with mock.patch("torch.rand", lambda *a, **k: noise), redirect_stdout(StringIO()):
            logits, (paint, _) = theirs.train()(x)
            return squares(logits) + paint + sum(theirs.get_sparsity_loss("cpu")) + theirs.get_flops_loss(ours.config.target_gflops)

    r.same(theirs, lambda: (ours.eval()(x), our_loss(x, noise)), lambda: (theirs.eval()(x)[0], their_loss(x, noise)))
    name, x, noise = "ofb_deit_small_search, batch 2", torch.randn(2, 3, 224, 224), torch.rand(2, noise.shape[1])
    yield Pair(name, "forward", forward(ours, x), forward(theirs, x))
    yield Pair(name, "train", step(ours, lambda: our_loss(x, noise)), step(theirs, lambda: their_loss(x, noise)))
