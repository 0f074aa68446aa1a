"""TokenCut's normalised cut and bilateral solver beside github.com/YangtaoWANG95/TokenCut."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formarium.lenses.tokencut import refined, sample_objects
from formarium.nn.normalised_cut import normalised_cut
from references import Pair, importing

REPOSITORY = "YangtaoWANG95/TokenCut"


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone, clone / "unsupervised_saliency_detection"):
        import bilateral_solver
        from object_discovery import ncut
    solve = bilateral_solver.cg
    bilateral_solver.cg = lambda *a, tol, **k: solve(*a, rtol=tol, **k)  # as SciPy calls it now

    sample = sample_objects(1)[0]
    for grid in ((20, 20), (30, 40)):
        features = keys(sample["mask"], grid)
        image = (3, 16 * grid[0], 16 * grid[1])

        def ours(x: Any = features, grid: Any = grid, size: Any = image[1:]) -> Any:
            cut = normalised_cut(x[0, 1:].numpy(), grid, 0.2)
            return cut.box((16, 16), size), cut.mask

        def theirs(x: Any = features, grid: Any = grid, size: Any = image) -> Any:
            found = ncut(x, grid, (16, 16), size, tau=0.2)
            return found[0], found[2]

        same(ours(), theirs())
        yield Pair(f"normalised cut of {grid[0]}x{grid[1]} patches", "forward", ours, theirs)

    picture = np.kron(sample["image"], np.ones((2, 2, 1), np.uint8))  # 320x416
    rough = np.kron(sample["mask"][8::16, 8::16], np.ones((32, 32), bool))[: picture.shape[0], : picture.shape[1]]
    file = png(picture)

    def refine() -> Any:
        return refined(picture, rough, sigma_spatial=16, sigma_luma=16, sigma_chroma=8)

    def refine_theirs() -> Any:
        file.seek(0)
        return bilateral_solver.bilateral_solver_output(file, rough, sigma_spatial=16, sigma_luma=16, sigma_chroma=8)

    same(refine(), refine_theirs())
    yield Pair("bilateral solver, 320x416", "forward", refine, refine_theirs)


def keys(mask: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    """Features as of an object on a ground, class token first: float [1, 1 + patches, 64]."""
    torch.manual_seed(0)
    rows, columns = (torch.arange(n) * s // n for n, s in zip(grid, mask.shape, strict=True))
    inside = torch.from_numpy(mask)[rows][:, columns].flatten()
    kinds = torch.randn(2, 64)
    return torch.cat([torch.randn(1, 64), kinds[inside.long()] + 0.8 * torch.randn(len(inside), 64)])[None]


def png(image: np.ndarray) -> io.BytesIO:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=0)
    return file


def same(ours: Any, theirs: Any) -> None:
    for x, y in zip(ours, theirs, strict=True):
        if not np.allclose(np.asarray(x, float), np.asarray(y, float), atol=1e-3):
            raise SystemExit("TokenCut finds something else than formarium")
