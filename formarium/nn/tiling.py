"""Networks on inputs of any size in bounded memory: by tiles with a margin (images), or by a sliding window with blending (volumes).

Both work on [batch, channels, *spatial] with any number of spatial axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.nn.kept import kept

Network = Callable[[Tensor], Tensor]
Sides = tuple[int, ...]


def reflect_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Spatial sides up to the next multiple, mirrored at the end of each axis (the edge itself isn't repeated), however short it is."""
    for axis in range(2, x.ndim):
        side = x.shape[axis]
        more = -side % multiple
        if more:
            x = x.index_select(axis, reflected(side, side + more).to(x.device))
    return x


@kept(64)
def reflected(side: int, wanted: int) -> Tensor:
    """Indices 0 .. wanted - 1 folded back into 0 .. side - 1: 0 1 2 1 0 1 ... for side 3."""
    period = max(1, 2 * (side - 1))
    at = torch.arange(wanted) % period
    return torch.minimum(at, period - at) if side > 1 else torch.zeros(wanted, dtype=torch.int64)


# tiles with a margin ------------------------------------------------------------------------------------------------


def tiled(network: Network, x: Tensor, tile: int, margin: int, scale: int = 1) -> Tensor:
    """`network` on tiles that don't overlap, each seen with up to `margin` more on every side, which is cut off again.

    network: [batch, channels, *spatial] -> [batch, out, *(scale * spatial)]. Where the input fits one tile, it is run whole. No more than
    (tile + 2 * margin) to a side goes through the network at once.
    """
    sides = tuple(x.shape[2:])
    if all(s <= tile for s in sides):
        return network(x)
    out: Tensor | None = None
    for starts in itertools.product(*(range(0, s, tile) for s in sides)):
        stops = [min(a + tile, s) for a, s in zip(starts, sides, strict=True)]
        low = [max(a - margin, 0) for a in starts]
        high = [min(z + margin, s) for z, s in zip(stops, sides, strict=True)]
        seen = network(x[(..., *map(slice, low, high))])
        if out is None:
            out = seen.new_empty(*seen.shape[:2], *(s * scale for s in sides))
        inside = tuple(slice((a - lo) * scale, (z - lo) * scale) for a, z, lo in zip(starts, stops, low, strict=True))
        out[(..., *(slice(a * scale, z * scale) for a, z in zip(starts, stops, strict=True)))] = seen[(..., *inside)]
    assert out is not None
    return out


# a sliding window ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def sliding_window(
    network: Network, x: Tensor, window: Sequence[int], overlap: float = 0.5, weighting: str = "gaussian", batch_size: int = 4
) -> Tensor:
    """The mean of what `network` says of overlapping windows, each voxel weighted by its place in the window.

    x: float [batch, channels, *spatial]; where it is smaller than the window it is padded with zeros, and cut again. overlap: share of a
    window's side that the next one shares, 0 to below 1. weighting: "gaussian" (sigma an eighth of the side) or "constant".
    Returns float32 [batch, out, *spatial]. The numbers are those of MONAI's sliding_window_inference.
    """
    sides = tuple(x.shape[2:])
    missing = [max(w - s, 0) for w, s in zip(window, sides, strict=True)]
    pads = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
    padded = F.pad(x, pads)
    window = tuple(window)
    weight = window_weight(window, weighting).to(x.device)
    places = [(b, start) for b in range(len(x)) for start in starts(tuple(padded.shape[2:]), window, overlap)]
    total: Tensor | None = None
    for at in range(0, len(places), batch_size):
        some = places[at : at + batch_size]
        cuts = [(slice(b, b + 1), slice(None), *(slice(a, a + w) for a, w in zip(s, window, strict=True))) for b, s in some]
        said = network(torch.cat([padded[cut] for cut in cuts])).float() * weight
        if total is None:
            total = said.new_zeros(len(x), said.shape[1], *padded.shape[2:])
            count = said.new_zeros(1, 1, *padded.shape[2:])
        for i, cut in enumerate(cuts):
            total[cut] += said[i : i + 1]
            if some[i][0] == 0:
                count[(slice(None), *cut[1:])] += weight
    assert total is not None
    return (total / count)[(..., *(slice(m // 2, m // 2 + s) for m, s in zip(missing, sides, strict=True)))]


def starts(sides: Sides, window: Sides, overlap: float) -> Iterator[Sides]:
    """Where windows begin: even steps of (1 - overlap) sides, the last one moved back so that it ends at the edge."""
    steps = [1 if w == s else 0 for w, s in zip(window, sides, strict=True)]
    steps = [w if whole else max(1, int(w * (1 - overlap))) for w, whole in zip(window, steps, strict=True)]
    axes = []
    for s, w, step in zip(sides, window, steps, strict=True):
        count = next(i + 1 for i in range(-(-s // step)) if i * step + w >= s)
        axes.append([min(i * step, s - w) for i in range(count)])
    return itertools.product(*axes)


@kept(16)
def window_weight(window: Sides, weighting: str) -> Tensor:
    """float32 [*window], more than 0. The gaussian is separable, centred, 1 at its peak, nowhere less than a thousandth."""
    if weighting == "constant":
        return torch.ones(window)
    weight = torch.ones(())
    for side in window:
        place = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        weight = weight[..., None] * torch.exp(-(place**2) / (2 * (side * 0.125) ** 2))
    return weight.clamp(min=max(float(weight[weight > 0].min()), 1e-3))
