"""DrugGEN's generator and discriminator beside github.com/HUBioDataLab/DrugGEN."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from references import Pair, both, importing, recorded

REPOSITORY = "HUBioDataLab/DrugGEN"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone):
        from src.model.models import Discriminator, Generator
    for name, cls in (("druggen_generator", Generator), ("druggen_discriminator", Discriminator)):
        r = recorded("druggen", name)
        theirs = r.same(cls(**r.constructor))
        inputs = tuple(torch.cat([x] * max(1, 16 // len(x))) for x in r.inputs)
        yield from both(f"{name}, batch {len(inputs[0])}", r.ours, theirs, *inputs)
