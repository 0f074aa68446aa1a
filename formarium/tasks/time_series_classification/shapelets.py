"""Shapelet discovery: pieces of training series that tell one class from the rest (Le et al., KDD 2024, section 4.1; PISD, 2022).

Candidates lie between perceptually important points. A candidate's distance to a series is that of its best match nearby, weighed by how
differently complex the two are; its worth is the information gain of the best cut of all series by that distance. Arrays throughout,
all series and all offsets at once. Series are float64 [series, channels, length].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from formarium.errors import BadInput

FLOOR = 0.001  # added to sums of squared differences, so that flat pieces have a complexity
CHUNK = 4_000_000  # numbers in one piece of a distance table


@dataclass(frozen=True)
class Shapelet:
    """values = series[channel, start:end] of training series `series`; gain in bits; number of its class; gap between near and far
    series."""

    series: int
    start: int
    end: int
    gain: float
    label: int
    channel: int
    gap: float = 0.0


def discover(x: np.ndarray, label: np.ndarray, per_class: int, window: int, share: float = 0.2, released: bool = False) -> list[Shapelet]:
    """The `per_class` best shapelets of each class, class by class, each class's by their start.

    window: how far from its place a candidate looks for its match. share: of a series' points that become important ones (5 at least).
    Of equal gains, which are many where classes are easy to tell apart, the one with the wider gap between near and far series is better.
    released: as the released code computes, which differs from this. It looks at cuts with 20 and 40 % of the class on the near side only,
    not at every cut with more of the class on that side than there are in all; for the complexity of a piece [start, end) it takes channels
    start to end - 2 of the whole series, as far as there are any up to its own; and it leaves equal gains to the sorting. Raises
    BadInput for series too short to have a candidate, one class, or values that are not finite.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.shape[-1] < 5:
        raise BadInput("series", expected="at least 5 points to find shapelets in", got=str(x.shape[-1]))
    if not np.isfinite(x).all():
        raise BadInput("series", expected="finite values", got=f"{(~np.isfinite(x)).sum()} NaN or infinite ones")
    if len(np.unique(label)) < 2:
        raise BadInput("series", expected="at least two classes", got="one")
    found = candidates(x, label, window, share, released)
    best = [rows for table in found for rows in best_apart(table, per_class)]
    return [Shapelet(int(r[0]), int(r[1]), int(r[2]), float(r[3]), int(r[4]), int(r[5]), float(sum(r[6:]))) for r in best]


def candidates(x: np.ndarray, label: np.ndarray, window: int, share: float = 0.2, released: bool = False) -> list[np.ndarray]:
    """For each class (in order) its candidates float64 [candidates, 7]: series, start, end, gain, class, channel, gap (not where released);
    channel by channel, then series by series, in the order in which the important points came."""
    spans = spans_of(x, share)  # series channels candidates 2
    rated: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    whole = np.cumsum(np.pad((np.diff(x, axis=2) ** 2).sum(2), ((0, 0), (1, 0))), axis=1)  # n c+1, summed over the channels before
    for channel in range(x.shape[1]):
        squares = np.diff(x[:, channel], axis=1) ** 2
        rough = np.concatenate([np.zeros((len(x), 1)), np.cumsum(squares, axis=1)], axis=1)  # n t
        for i in range(len(x)):
            start, end = spans[i][channel].T
            own = rough[i, end - 1] - rough[i, start]
            if released:
                first = np.minimum(start, channel + 1)
                own = whole[i, np.maximum(np.minimum(end - 1, channel + 1), first)] - whole[i, first]
            distance = distances(x[:, channel], rough, i, spans[i][channel], own, window)  # k n
            distance[:, i] = 0
            rated[i, channel] = information_gain(distance, label == label[i], released)
    tables = []
    for c in np.unique(label):
        members = np.flatnonzero(label == c)
        parts = []
        for channel in range(x.shape[1]):
            for i in members:
                own = spans[i][channel]
                row = np.empty((len(own), 7))
                row[:, 0], row[:, 1:3], row[:, 4], row[:, 5] = i, own, c, channel
                row[:, 3], row[:, 6] = rated[i, channel]
                parts.append(row[:, :6] if released else row)
        tables.append(np.concatenate(parts))
    return tables


# candidates ---------------------------------------------------------------------------------------------------------


def important_points(x: np.ndarray, share: float = 0.2) -> np.ndarray:
    """The perceptually important points of series [series, length] in the order they are found: int [series, points - 2].

    Beside the two ends, the next one is always the point that lies farthest (at a right angle) from the line between its important
    neighbours; time is scaled to mean 0 and deviation 1.
    """
    n, length = x.shape
    time = (np.arange(length) - (length - 1) / 2) / np.std(np.arange(length))
    count = min(max(int(share * length), 5), length) - 2
    chosen = np.zeros((n, length), dtype=bool)
    chosen[:, [0, -1]] = True
    place, rows = np.arange(length), np.arange(n)[:, None]
    order = np.empty((n, count), dtype=np.int64)
    for step in range(count):
        left = np.maximum.accumulate(np.where(chosen, place, 0), axis=1)
        right = np.minimum.accumulate(np.where(chosen, place, length - 1)[:, ::-1], axis=1)[:, ::-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            slope = (x[rows, right] - x[rows, left]) / (time[right] - time[left])
            offset = x[rows, right] - time[right] * slope
            far = np.abs(-x + slope * time + offset) / np.sqrt(slope**2 + 1)
        order[:, step] = np.where(chosen, -np.inf, far).argmax(1)
        chosen[np.arange(n), order[:, step]] = True
    return order


def spans_of(x: np.ndarray, share: float = 0.2) -> list[list[np.ndarray]]:
    """Candidate intervals [start, end) of every series and channel, int [candidates, 2]: for each new important point the ones between
    its neighbours, from two before to it, and from it to two behind."""
    n, channels, length = x.shape
    orders = important_points(x.reshape(n * channels, length), share)
    every = []
    for order in orders:
        points, spans = [0, length - 1], []
        for point in order.tolist():
            at = int(np.searchsorted(points, point))
            points.insert(at, point)
            spans.append((points[at - 1], points[at + 1]))
            if at > 1:
                spans.append((points[at - 2], point))
            if at < len(points) - 2:
                spans.append((point, points[at + 2]))
        every.append(np.array(spans))
    return [every[i * channels : (i + 1) * channels] for i in range(n)]


# distances ----------------------------------------------------------------------------------------------------------


def distances(x: np.ndarray, rough: np.ndarray, i: int, spans: np.ndarray, own: np.ndarray, window: int) -> np.ndarray:
    """Of the pieces `spans` [candidates, 2] of series i to all series x [series, length]: float64 [candidates, series].

    The least, over shifts by less than `window` (and one to the right of that), of the Euclidean distance times the larger complexity over
    the smaller; a complexity is the root of the sum of squared steps. rough: the running sum of these squares, [series, length]; own: the
    sum for each piece.
    """
    length, window = x.shape[1], min(window, x.shape[1])
    start, end = spans[:, 0], spans[:, 1]
    shift = np.arange(max(1 - window, -int(start.max())), min(window, length - int(end.min())) + 1)
    lowest, highest = np.maximum(1 - window, -start), np.minimum(window, length - end)
    allowed = (shift >= lowest[:, None]) & (shift <= highest[:, None])  # k o
    complexity = np.sqrt(np.maximum(own, 0) + FLOOR)[:, None]  # k 1
    first = np.clip(start[:, None] + shift, 0, length - 1)  # k o
    last = np.clip(end[:, None] + shift - 1, 0, length - 1)
    out = np.empty((len(spans), len(x)))
    step = max(1, CHUNK // (length * len(shift)))
    for at in range(0, len(x), step):
        part = x[at : at + step]
        padded = np.pad(part, ((0, 0), (-int(shift[0]), int(shift[-1]))))
        shifted = np.lib.stride_tricks.sliding_window_view(padded, length, axis=1)  # n o t
        table = np.zeros((len(part), len(shift), length + 1))
        np.cumsum((x[i] - shifted) ** 2, axis=2, out=table[:, :, 1:])
        squared = table[:, :, end] - table[:, :, start]  # n o k
        theirs = np.sqrt(np.maximum(rough[at : at + step][:, last] - rough[at : at + step][:, first], 0) + FLOOR)  # n k o
        far = np.sqrt(np.maximum(squared, 0)).transpose(0, 2, 1) * (np.maximum(theirs, complexity) / np.minimum(theirs, complexity))
        out[:, at : at + step] = np.where(allowed, far, np.inf).min(2).T
    return out


def information_gain(distance: np.ndarray, positive: np.ndarray, released: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(gain, gap) [candidates] of the best cut of the series by distance [candidates, series] into near and far ones.

    gain: in bits, of knowing the side; -1 where no cut is looked at. gap: how much farther the far ones are on the average, relative to the
    average of all. positive: bool [series], whether of the candidate's class. released: see `discover`.
    """
    count, total = distance.shape
    order, each = distance.argsort(1), np.arange(count)
    near = np.cumsum(positive[order], axis=1)[:, :-1].astype(np.float64)  # of the class among the 1, 2, ... nearest
    size = np.arange(1, total)
    of_class = float(positive.sum())
    whole = _entropy(np.array([of_class]), np.array([total - of_class]))
    gain = whole - (size / total) * _entropy(near, size - near)
    gain = gain - ((total - size) / total) * _entropy(of_class - near, (total - size) - (of_class - near))
    if released:
        return _first_cuts(gain, near, of_class), np.zeros(count)
    gain = np.where(near * total >= of_class * size, gain, -1.0)
    best = gain.argmax(1)
    inside = np.cumsum(np.take_along_axis(distance, order, 1), axis=1)
    mean_near = inside[each, best] / (best + 1)
    mean_far = (inside[:, -1] - inside[each, best]) / (total - best - 1)
    return gain[each, best], (mean_far - mean_near) / (inside[:, -1] / total + 1e-12)


def _first_cuts(gain: np.ndarray, near: np.ndarray, of_class: float) -> np.ndarray:
    """The better of the cuts where the share of the class on the near side, rounded to tenths, first is 0.2 and then first is 0.4."""
    tenths = np.array([round(k / of_class, 1) for k in range(int(of_class) + 1)])
    share, each = tenths[near.astype(np.int64)], np.arange(len(gain))
    out, reached, at = np.full(len(gain), -1.0), np.ones(len(gain), dtype=bool), np.zeros(len(gain), dtype=np.int64)
    for rate in (0.2, 0.4):
        hit = (share == rate) & (np.arange(gain.shape[1]) >= at[:, None])
        reached &= hit.any(1)
        at = hit.argmax(1)
        out = np.where(reached, np.maximum(out, gain[each, at]), out)
        at = at + 1
    return out


def _entropy(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of two counts, in bits."""
    total = a + b
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = a / total, b / total
        return np.where(p > 0, -p * np.log2(p), 0) - np.where(q > 0, q * np.log2(q), 0)


# choice -------------------------------------------------------------------------------------------------------------


def best_apart(table: np.ndarray, count: int) -> np.ndarray:
    """The rows of greatest gain (and gap, where there is one) of candidates that don't overlap in one channel; where there aren't enough,
    overlapping ones too. Sorted by start."""
    order = table[np.lexsort((table[:, 6], table[:, 3].round(9))) if table.shape[1] > 6 else table[:, 3].argsort()]
    kept = [len(order) - 1]
    for i in range(len(order) - 2, -1, -1):
        if len(kept) == count:
            break
        others = order[kept]
        if not ((others[:, 5] == order[i, 5]) & (others[:, 1] < order[i, 2]) & (order[i, 1] < others[:, 2])).any():
            kept.append(i)
    for i in range(len(order) - 2, -1, -1):
        if len(kept) >= count:
            break
        if i not in kept:
            kept.append(i)
    chosen = order[kept]
    return chosen[chosen[:, 1].argsort()]
