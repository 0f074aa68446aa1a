"""MossFormer beside github.com/modelscope/modelscope."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from formarium.models.audio.mossformer import rotate, rotations
from references import Pair, both, importing, recorded

REPOSITORY = "modelscope/modelscope"
FOLDER = "modelscope/models/audio/separation"


class Base(nn.Module):
    """modelscope's model, as much as is asked of it."""

    def __init__(self, model_dir: str, **rest: object):
        super().__init__()


class Rotary(nn.Module):
    """rotary_embedding_torch's RotaryEmbedding, its table kept."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def rotate_queries_or_keys(self, x: Tensor) -> Tensor:
        return rotate(x, *rotations(x.shape[-2], self.dim, x.device))


class LayerNorm(nn.Module):
    """speechbrain's, which wraps torch's."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


STUBS = {
    "modelscope": {},
    "modelscope__metainfo": {"Models": MagicMock()},
    "modelscope__models": {"MODELS": SimpleNamespace(register_module=lambda *a, **k: lambda cls: cls), "TorchModel": Base},
    "modelscope__models__audio": {},
    "modelscope__models__base": {},
    "modelscope__utils": {},
    "modelscope__utils__constant": {"Tasks": MagicMock()},
    "rotary_embedding_torch": {"RotaryEmbedding": Rotary},
    "speechbrain": {"nnet": SimpleNamespace(normalization=SimpleNamespace(LayerNorm=LayerNorm))},
}


def pairs(clone: Path) -> Iterator[Pair]:
    r = recorded("mossformer", "mossformer_l_2spk")
    with importing(clone, **STUBS, modelscope__models__audio__separation={"__path__": [str(clone / FOLDER)]}):
        from modelscope.models.audio.separation.mossformer import MossFormer

        theirs = MossFormer("", **r.constructor)
    yield from both("mossformer_l_2spk, half a second", r.ours, r.same(theirs), torch.randn(1, 4000))
