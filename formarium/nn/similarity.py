"""How alike two sets of features of the same samples are, whatever their axes: RSA, CKA, SVCCA.

Each takes x [samples, channels of x] and y [samples, channels of y], rows belonging together, and gives a number that is 1 for equal
geometries and unchanged by rotating, shifting or scaling either set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.nn.components import Components, centre

# representational similarity analysis -------------------------------------------------------------------------------


def distances(x: Tensor, metric: str = "euclidean") -> Tensor:
    """The distances of all pairs of samples, float64 [samples * (samples - 1) / 2]: the upper triangle, row by row.

    metric: "euclidean", or "cosine" (1 - cosine similarity).
    """
    x = x.double()
    if metric == "euclidean":
        return torch.nn.functional.pdist(x)
    if metric != "cosine":
        raise ValueError(f"metric {metric!r}")
    unit = F.normalize(x, dim=1)
    row, column = torch.triu_indices(len(x), len(x), 1)
    return 1 - (unit @ unit.T)[row, column]


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing the mean of theirs; float64, the shape of values."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of two vectors; NaN where one is constant."""
    return _unit(ranks(a)) @ _unit(ranks(b))


def rsa(x: Tensor, y: Tensor, metric: str = "euclidean") -> Tensor:
    """Representational similarity: the rank correlation of the two sets' pairwise distances (Kriegeskorte et al. 2008). In [-1, 1]."""
    return spearman(distances(x, metric), distances(y, metric))


def rsa_matrix(xs: Sequence[Tensor], ys: Sequence[Tensor], metric: str = "euclidean") -> Tensor:
    """`rsa` of every x with every y, [len(xs), len(ys)]; each set's distances are ranked once."""
    return _signatures(xs, metric) @ _signatures(ys, metric).T


def _signatures(sets: Sequence[Tensor], metric: str) -> Tensor:
    return torch.stack([_unit(ranks(distances(x, metric))) for x in sets])


def _unit(v: Tensor) -> Tensor:
    """Centred and scaled to length 1, so that a dot product is Pearson's correlation."""
    v = v.double() - v.double().mean()
    return v / v.norm()


# centred kernel alignment -------------------------------------------------------------------------------------------


def cka(x: Tensor, y: Tensor, debiased: bool = False) -> Tensor:
    """Linear centred kernel alignment (Kornblith et al. 2019). In [0, 1]; debiased, which few samples in many channels need, around 0 for
    unrelated sets (it may be a little below)."""
    return cka_matrix([x], [y], debiased)[0, 0]


def cka_matrix(xs: Sequence[Tensor], ys: Sequence[Tensor], debiased: bool = False) -> Tensor:
    """`cka` of every x with every y, [len(xs), len(ys)]."""
    return _kernels(xs, debiased) @ _kernels(ys, debiased).T


def _kernels(sets: Sequence[Tensor], debiased: bool) -> Tensor:
    return torch.stack([_kernel(x, debiased) for x in sets])


def _kernel(x: Tensor, debiased: bool) -> Tensor:
    """The centred Gram matrix as a vector of length 1 [samples^2]."""
    x = centre(x.double())
    gram = x @ x.T
    if debiased:  # U-centring (Szekely & Rizzo 2014): without the diagonal, rows and columns still sum to 0
        n = len(gram)
        gram = gram.fill_diagonal_(0)
        rows = gram.sum(1, keepdim=True)
        gram = gram - (rows + rows.T) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
        gram = gram.fill_diagonal_(0)
    return (gram / gram.norm()).flatten()


# canonical correlations ---------------------------------------------------------------------------------------------


def svcca(x: Tensor, y: Tensor, variance: float = 0.99) -> Tensor:
    """The mean canonical correlation of the leading components that explain `variance` of each set (Raghu et al. 2017). In [0, 1]."""
    return svcca_matrix([x], [y], variance)[0, 0]


def svcca_matrix(xs: Sequence[Tensor], ys: Sequence[Tensor], variance: float = 0.99) -> Tensor:
    """`svcca` of every x with every y, [len(xs), len(ys)]; each set is decomposed once."""
    left, right = ([_basis(x, variance) for x in sets] for sets in (xs, ys))
    return torch.stack([torch.stack([_canonical(a, b) for b in right]) for a in left])


def _basis(x: Tensor, variance: float) -> Tensor:
    components = Components.of(x)
    return components.u[:, : components.count(variance)]


def _canonical(a: Tensor, b: Tensor) -> Tensor:
    """The mean of the min(k, l) canonical correlations of two orthonormal bases [samples, k] and [samples, l]."""
    return torch.linalg.svdvals(a.T @ b).clamp(0, 1).mean()
