"""RoITr beside github.com/haoyu94/RoITr.

Its neighbour search and its farthest points are kernels for GPUs: both sides have ours here, and the rest is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from formarium.engine.records import read_record
from formarium.models.points.roitr import mutual_matches, node_overlaps
from formarium.nn.ops.points import farthest_points, nearest_neighbours
from references import Pair, forward, importing, on_cpu, recorded, step

REPOSITORY = "haoyu94/RoITr"
LOSS = Path(__file__).resolve().parents[2] / "tests" / "parity" / "roitr" / "roitr_loss.safetensors"


def knn(m: int, k: int, points: Tensor, queries: Tensor, offset: Tensor, new_offset: Tensor, index: Tensor, squared: Tensor) -> None:
    near, distance = nearest_neighbours(queries[None], points[None], torch.tensor([len(points)]), k)
    index.copy_(near[0])
    squared.copy_(distance[0].square())


def farthest(b: int, n: int, points: Tensor, offset: Tensor, new_offset: Tensor, distance: Tensor, index: Tensor) -> None:
    index.copy_(farthest_points(points[None], torch.tensor([len(points)]), len(index))[0])


@contextmanager
def here() -> Iterator[None]:
    """Their code asks for a GPU by name."""
    floats = mock.patch.object(torch.cuda, "FloatTensor", torch.FloatTensor)
    with on_cpu(), floats, mock.patch.object(torch.cuda, "IntTensor", torch.IntTensor):
        yield


class Theirs(nn.Module):
    def __init__(self, model: nn.Module, loss: nn.Module):
        super().__init__()
        self.model, self.criterion = model, loss

    def forward(self, b: dict[str, Tensor]) -> dict[str, Tensor]:
        source, target = b["source"][0], b["target"][0]
        with here():
            return self.model(source, target, torch.ones(len(source), 1), torch.ones(len(target), 1), b["source_normals"][0],
                              b["target_normals"][0], torch.eye(3), torch.zeros(3, 1), source)  # fmt: skip

    def loss(self, b: dict[str, Tensor]) -> Tensor:
        found = self(b)
        with here():
            return self.criterion(found, {"rot": torch.eye(3)[None], "trans": torch.zeros(1, 3, 1)})["loss"]


class Ours(nn.Module):
    """Correspondences, and the true overlaps of patches, which theirs always computes."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, b: dict[str, Tensor]) -> tuple[Tensor, ...]:
        c = self.model.config
        (pair,) = self.model.pairs(b)
        node_overlaps(pair["target"], pair["source"], pair["t"], pair["s"], c.matching_radius)
        t, s, _, plan = self.model.match(pair)
        mutual_matches(plan[:, :-1, :-1].exp(), pair["t"].mask[t], pair["s"].mask[s], c.top_k, c.mutual, c.confidence)
        return pair["source_nodes"], pair["target_features"], plan


def pairs(clone: Path) -> Iterator[Pair]:
    kernels = {"pointops_cuda": {"knnquery_cuda": knn, "furthestsampling_cuda": farthest}}
    with importing(clone, open3d={}, **kernels):
        from lib.loss import OverallLoss
        from model import RIGA_v2
    nothing = None, None  # scores of occlusion, whose loss has no weight
    RIGA_v2.get_node_occlusion_score = lambda *a, **k: nothing
    r = recorded("roitr", "roitr_3dmatch")
    how = read_record(LOSS).header["reference"]["constructor"]
    how["fine_loss_positive_radius"] = r.constructor["matching_radius"]
    theirs, ours = Theirs(RIGA_v2.RIGA_v2(SimpleNamespace(**r.constructor)), OverallLoss(SimpleNamespace(**how))), Ours(r.ours)
    batch = clouds(2000)

    def said() -> list[Tensor]:
        found = theirs.eval()(batch)
        return [found[k] for k in ("src_node_feats", "tgt_point_feats", "matching_scores")]

    r.same(theirs.model, lambda: [x.exp() if i == 2 else x for i, x in enumerate(ours.eval()(batch))],
           lambda: [x.exp() if i == 2 else x for i, x in enumerate(said())])  # fmt: skip
    yield Pair("roitr_3dmatch, 2 x 2000 points", "forward", forward(ours, batch), forward(theirs, batch))
    yield Pair(
        "roitr_3dmatch, 2 x 2000 points",
        "train",
        step(r.ours, lambda: r.ours.loss(batch).total),
        step(theirs, lambda: theirs.loss(batch)),
    )


def clouds(count: int) -> dict[str, Tensor]:
    """Two that see the same waved ground from 2 m, three quarters of it both."""
    torch.manual_seed(0)
    batch = {"transform": torch.eye(4)[None]}
    for name, shift in (("source", 0.0), ("target", 0.5)):
        x, y = (torch.rand(2, count) * 2 + torch.tensor([[shift], [0.0]])).unbind()
        points = torch.stack([x, y, 0.3 * torch.sin(3 * x) * torch.cos(2 * y)], 1)
        normals = torch.stack([-0.9 * torch.cos(3 * x) * torch.cos(2 * y), 0.6 * torch.sin(3 * x) * torch.sin(2 * y), torch.ones(count)], 1)
        batch |= {name: points[None], f"{name}_normals": nn.functional.normalize(normals, dim=1)[None]}
        batch[f"{name}_count"] = torch.tensor([count])
    return batch
