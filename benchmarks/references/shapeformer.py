"""ShapeFormer beside github.com/xuanmay2701/shapeformer: the network, and the discovery of shapelets."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formarium.authors import authors_of
from formarium.tasks.time_series_classification.shapelets import candidates
from references import Pair, both, importing, on_cpu, recorded

REPOSITORY = "xuanmay2701/shapeformer"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone):
        from Models.shapeformer import Shapeformer
        from Shapelet import mul_shapelet_discovery

    class OnCPU(Shapeformer):
        """Their forward moves indices to a GPU."""

        def forward(self, x: Tensor) -> Any:
            with on_cpu():
                return super().forward(x, 0)

    r = recorded("shapeformer", "shapeformer_basicmotions")
    how = {**r.constructor, "shapelets_info": np.array(r.constructor["shapelets_info"])}
    how["shapelets"] = [np.array(s) for s in how["shapelets"]]
    header = {"reference": {"constructor": r.constructor}}
    replay: Any = authors_of("shapeformer").call
    theirs = r.same(OnCPU(how, how["num_classes"]), lambda: replay(r.ours.eval(), {"x": r.inputs[0]}, header))
    x = torch.randn(128, r.constructor["ts_dim"], r.constructor["len_ts"])
    yield from both("shapeformer_basicmotions, batch 128", r.ours, theirs, x)

    # their pool of processes: one that does it all itself
    here = SimpleNamespace(map=lambda f, xs: [f(x) for x in xs])
    mul_shapelet_discovery.multiprocessing = SimpleNamespace(Pool=lambda processes: here, cpu_count=lambda: 1)
    rng = np.random.default_rng(0)
    series, label = rng.standard_normal((12, 3, 60)).cumsum(2), np.arange(12) % 2

    def ours() -> Any:
        return candidates(series, label, 20, 0.2, released=True)

    def found() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            search = mul_shapelet_discovery.ShapeletDiscover(window_size=20, num_pip=0.2, processes=1, dim=3)
            search.extract_candidate(series)
            search.discovery(series, label)
        return [np.concatenate(group) for group in search.list_group_ppi]

    for a, b in zip(ours(), found(), strict=True):
        if not np.allclose(a, b, atol=1e-4):
            raise SystemExit("other candidates than formarium's")
    yield Pair("discovery in 12 series of 3x60", "forward", ours, found)
