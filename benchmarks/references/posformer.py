"""PosFormer beside github.com/SJTU-DeepVisionLab/PosFormer: forward and training step with identifiers and losses, and the beam search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn

from formarium.models.text import posformer as ours_module
from references import Pair, calling, importing, on_cpu, recorded, step

REPOSITORY = "SJTU-DeepVisionLab/PosFormer"
SIZE, BEAMS, STEPS = (96, 256), 4, 30


class Lightning(nn.Module):
    """pytorch_lightning's module, as much as is asked of it."""

    device = torch.device("cpu")


def pairs(clone: Path) -> Iterator[Pair]:
    data = ModuleType("Pos_Former.datamodule")  # without its __init__, which imports the loaders
    data.__path__ = [str(clone / "Pos_Former" / "datamodule")]  # type: ignore[attr-defined]
    stubs = {"pytorch_lightning": {"LightningModule": Lightning}, "torchmetrics": {"Metric": nn.Module}}
    with importing(clone, **stubs), patch.dict("sys.modules", {data.__name__: data}):
        from Pos_Former.datamodule import label_make_muti, vocab  # vocab: the file

        data.vocab, data.vocab_size = vocab.vocab, len(vocab.vocab)  # type: ignore[attr-defined]
        from Pos_Former.model.posformer import PosFormer
        from Pos_Former.utils.utils import ce_loss_all, to_bi_tgt_out

    r = recorded("posformer", "posformer_base")
    theirs = PosFormer(**r.constructor)
    image, mask, tgt = r.inputs
    rows = torch.stack(tgt.chunk(2), 1)
    with on_cpu():
        r.same(
            theirs,
            lambda: [torch.cat([x[:, 0], x[:, 1]]) for x in r.ours.eval()(image, mask, rows, identifiers(rows, r.ours))],
            lambda: theirs.eval()(image, mask, tgt, None),
        )

    words = [
        "x",
        "^",
        "{",
        "2",
        "}",
        "+",
        "\\frac",
        "{",
        "a",
        "_",
        "{",
        "1",
        "}",
        "}",
        "{",
        "b",
        "}",
        "=",
        "\\sqrt",
        "{",
        "y",
        "}",
        "-",
        "3",
    ]
    formula = vocab.vocab.words2indices(words)
    image, mask = torch.rand(2, 1, *SIZE), torch.zeros(2, *SIZE, dtype=torch.bool)
    tokens = torch.tensor([formula] * 2)
    targets, out = to_bi_tgt_out([formula] * 2, "cpu")
    rows = torch.stack(targets.chunk(2), 1)
    batch = {"image": image, "mask": mask, "tokens": tokens}

    def their_answer() -> object:
        with on_cpu():
            return theirs(image, mask, targets, None)

    def their_loss() -> Tensor:
        with on_cpu():
            symbols, levels, places = theirs(image, mask, targets, None)
        level, place = map(torch.tensor, label_make_muti.out2layernum_and_pos(targets.tolist()))
        symbols, levels, places = ce_loss_all(symbols, out, levels, level, places, place)
        return (symbols + 0.25 * levels + 0.25 * places) / 1.5

    ours_forward = calling(r.ours, lambda: r.ours(image, mask, rows, identifiers(rows, r.ours)))
    size = f"2 images of {SIZE[0]}x{SIZE[1]}"
    yield Pair(f"posformer_base, {size}", "forward", ours_forward, calling(theirs, their_answer))
    yield Pair(f"posformer_base, {size}", "train", step(r.ours, lambda: r.ours.loss(batch).total), step(theirs, their_loss))

    searching = type(r.ours)(replace(r.ours.config, beams=BEAMS, max_len=STEPS))
    searching.load_state_dict(r.ours.state_dict())
    searching.eval()

    their_search = calling(theirs, lambda: theirs.beam_search(image, mask, BEAMS, STEPS, 1.0, False, 1.0))
    yield Pair(f"posformer_base, beam search, {size}, {STEPS} steps", "forward", lambda: searching.search(image, mask), their_search)


def identifiers(rows: Tensor, model: nn.Module) -> Tensor:
    """As in ours' forward_batch, the memory of rows seen before left out."""
    ours_module._forest.cache_clear()
    return ours_module.identifiers(rows, model.structure)  # type: ignore[attr-defined]
