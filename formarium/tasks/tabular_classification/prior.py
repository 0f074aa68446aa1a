"""The prior of TabPFN: data sets drawn from random structural causal models, Bayesian neural networks and Gaussian processes.

Hollmann et al., ICLR 2023, sections 4.1-4.4 and appendix C. One seed gives one data set: columns of numbers, some of them categorical,
and a class for each row. Every hyperparameter of the generating mechanism is itself drawn, from distributions whose own parameters are
drawn (the paper's mixture over simple and complicated causes).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from formarium.errors import UnknownName
from formarium.tasks.tabular_classification.scaling import clip_outliers, normalise

IGNORED = -100  # label of a row that no loss counts
Generator = np.random.Generator


@dataclass(frozen=True)
class Prior:
    """How large its data sets are, and which mechanisms may make them.

    rows: of every data set. features, classes: at most so many; their number is uniform from 1 (2) up. context: (least, most) rows of the
    labelled part, drawn uniformly. categorical: the share of data sets with categorical columns. missing: the share of data sets with
    missing values, and at most this share of their cells. gaussian_process: whether that mechanism is in the bag.

    As the released network was trained, classes are cut at values of random rows, their numbers say nothing of the target's order, and
    causes are Gaussian. The released code's wider search space: borders "either" (also at draws of a normal), ordered 0.5 (in a share of
    the data sets, uniform up to this, classes keep the target's order) and mixed_causes (also categories and counts).
    """

    rows: int = 128
    features: int = 32
    classes: int = 5
    context: tuple[int, int] = (16, 112)
    categorical: float = 0.2
    missing: float = 0.0
    gaussian_process: bool = True
    borders: str = "rank"  # or "either"
    ordered: float = 0.0
    mixed_causes: bool = False

    def __post_init__(self) -> None:
        if self.borders not in ("rank", "either"):
            raise UnknownName("borders", self.borders, ("rank", "either"))


def draw(prior: Prior, rng: Generator) -> tuple[np.ndarray, np.ndarray, int]:
    """(x float32 [rows, features], label int64 [rows], context): one data set, its rows in random order, the first `context` of them
    labelled.

    Columns have mean 0 and deviation 1 over all rows; missing cells are NaN. Labels are 0 .. classes - 1, each of them on both sides of
    the cut; where no cut could be found for which that holds, all labels are IGNORED.
    """
    features = int(rng.integers(1, prior.features + 1))
    context = int(rng.integers(prior.context[0], prior.context[1] + 1))
    x, y = _mechanism(prior, rng)(prior.rows, features, rng)
    if prior.missing > 0 and rng.random() < prior.missing:
        x = np.where(rng.random(x.shape) < rng.random() * prior.missing, np.nan, x)
    if rng.random() < prior.categorical:
        x = with_categories(x, rng)
    x = normalise(clip_outliers(x))
    y = normalise(y[:, None])[:, 0]
    classes = int(rng.integers(2, prior.classes + 1))
    ranks = prior.borders == "rank" or _choose((False, True), rng)
    label = (by_rank if ranks else by_value)(y, classes, rng.uniform(0, prior.ordered), rng)
    x, label = _compatible(x, label, context, rng)
    return np.nan_to_num(x, nan=np.nan, posinf=100, neginf=-100).astype(np.float32), _renumbered(label, rng), context


def _mechanism(prior: Prior, rng: Generator) -> Callable[[int, int, Generator], tuple[np.ndarray, np.ndarray]]:
    """The Gaussian process has weight exp(1) beside exp(w) of the networks, w uniform in [2, 10]."""
    w = rng.uniform(2, 10)
    if prior.gaussian_process and rng.random() < 1 / (1 + math.exp(w - 1)):
        return gaussian_process
    return partial(network, mixed=prior.mixed_causes)


# mechanisms: rows, features -> x [rows, features], y [rows] -----------------------------------------------------------


def network(rows: int, features: int, rng: Generator, mixed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A random multilayer perceptron with noise at every node, read in one of two ways.

    As a structural causal model (4.2): the first layer's inputs are causes nobody sees, features and target are nodes picked from all
    hidden layers. As a Bayesian neural network (4.3): the features are the inputs, the target is the output.
    """
    causal = _choose((True, False), rng)
    layers, width = 2 + round(_gamma(2, 3, rng)), 4 + round(_gamma(3, 100, rng))
    noise, scale = _log_normal(1e-4, 0.3, rng), _log_normal(0.01, 10.0, rng)
    drop = min(0.6 * rng.beta(rng.uniform(0.1, 5), rng.uniform(0.1, 5)), 0.99)
    blocks, per_node_noise = _choose((True, False), rng), _choose((True, False), rng)
    activation = _choose((np.tanh, _identity, _relu), rng, -5, 6)
    causes = 2 + round(_gamma(3, 7, rng)) if causal else features
    width = max(width, 1 + 2 * features) if causal else width
    inputs = causes_of(rows, causes, "mixed" if mixed and _choose((False, True), rng) else "normal", rng)
    sizes = [causes] + [width] * layers + ([] if causal else [1])
    hidden, nodes = inputs.astype(np.float32), []
    for i in range(len(sizes) - 1):
        weight, bias = _weights(sizes[i], sizes[i + 1], scale, drop if i else 0.0, blocks, rng)
        with np.errstate(over="ignore", invalid="ignore"):
            hidden = (activation(hidden) if i else hidden) @ weight + bias
        if i:
            deviation = noise * np.abs(rng.standard_normal(sizes[i + 1], np.float32)) if per_node_noise else np.float32(noise)
            hidden += deviation * rng.standard_normal((rows, sizes[i + 1]), np.float32)
            nodes.append(hidden)
    if not np.isfinite(hidden).all():  # deep, wide and steep at once: a table without classes, which no loss counts
        return np.zeros((rows, features)), np.zeros(rows)
    if not causal:
        return inputs, hidden[:, 0].astype(np.float64)
    x, y = _pick(np.concatenate(nodes, axis=1), features, rng)
    return np.roll(x, -int(rng.integers(features)), axis=1).astype(np.float64), y.astype(np.float64)


def _pick(nodes: np.ndarray, features: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features and target among the nodes [rows, nodes]: anywhere, or side by side (a clique); the target may be the last node."""
    effect, clique, ordered = (_choose((True, False), rng) for _ in range(3))
    total = nodes.shape[1]
    order = rng.integers(0, total - features) + rng.permutation(features + 1) if clique else rng.permutation(total - 1)
    chosen = order[1 : features + 1]
    return nodes[:, np.sort(chosen) if ordered else chosen], nodes[:, -1 if effect else order[0]]


def _weights(fan_in: int, fan_out: int, scale: float, drop: float, blocks: bool, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """A layer's weight [in, out] with connections missing at random, or all but those inside of diagonal blocks."""
    bias = (rng.uniform(-1, 1, fan_out) / math.sqrt(fan_in)).astype(np.float32)
    if not blocks:
        weight = np.float32(scale / (1 - math.sqrt(drop))) * rng.standard_normal((fan_in, fan_out), np.float32)
        return weight * (rng.random((fan_in, fan_out), np.float32) >= drop) if drop else weight, bias
    count = int(rng.integers(1, math.ceil(math.sqrt(min(fan_in, fan_out))) + 1))
    h, w = fan_in // count, fan_out // count
    weight = np.zeros((fan_in, fan_out), np.float32)
    deviation = scale / math.sqrt(count * h * w / (fan_in * fan_out))
    for i in range(count):
        weight[i * h : (i + 1) * h, i * w : (i + 1) * w] = np.float32(deviation) * rng.standard_normal((h, w), np.float32)
    return weight, bias


def causes_of(rows: int, count: int, sampling: str, rng: Generator) -> np.ndarray:
    """What drives a causal model [rows, count]: Gaussians of means and deviations of their own, or ("mixed") also categories and Zipf
    counts."""
    mean = rng.standard_normal(count)
    causes = rng.normal(mean, np.abs(rng.standard_normal(count) * mean), (rows, count))
    if sampling == "normal":
        return causes
    multinomial, normal = rng.random() * 0.66, rng.random() * 0.66
    for i in range(count):
        if rng.random() > normal:
            continue
        if rng.random() > multinomial:
            odds = rng.random(int(rng.integers(2, 11)))
            column = rng.choice(len(odds), rows, p=odds / odds.sum()).astype(float)
            causes[:, i] = (column - column.mean()) / (column.std() + 1e-6)
        else:
            column = np.minimum(rng.zipf(2.0 + rng.random() * 2, rows), 10).astype(float)
            causes[:, i] = column - column.mean()
    return causes


def gaussian_process(rows: int, features: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """A draw from a Gaussian process with a squared-exponential kernel over normal inputs (4.3's rival, and the paper's first prior)."""
    outputscale, lengthscale = _log_normal(1e-5, 10.0, rng), _log_normal(1e-5, 10.0, rng)
    noise = float(_choose((1e-5, 1e-4, 1e-2), rng))
    x = rng.standard_normal((rows, features))
    square = (x**2).sum(1)
    distance = np.maximum(square[:, None] + square[None] - 2 * x @ x.T, 0)
    kernel = outputscale * np.exp(-distance / (2 * max(lengthscale, 1e-6) ** 2)) + (noise + 1e-8) * np.eye(rows)
    return x, np.linalg.cholesky(kernel) @ rng.standard_normal(rows)


# columns and labels ---------------------------------------------------------------------------------------------------


def with_categories(x: np.ndarray, rng: Generator) -> np.ndarray:
    """Some columns (each with a probability that is drawn once) become category numbers, in an order that may say nothing."""
    x, share = x.copy(), rng.random()
    for column in range(x.shape[1]):
        values = max(round(rng.gamma(1, 10)), 2)
        if rng.random() < share:
            missing = np.isnan(x[:, column])
            x[:, column] = np.where(missing, np.nan, by_rank(x[:, column], values, 0.3, rng))
    return x


def by_rank(y: np.ndarray, most: int, ordered: float, rng: Generator) -> np.ndarray:
    """Classes [rows] by borders that are values of random rows (4.4)."""
    return _classes(y, lambda count: y[rng.integers(0, len(y), count - 1)], most, ordered, rng)


def by_value(y: np.ndarray, most: int, ordered: float, rng: Generator) -> np.ndarray:
    """Classes [rows] by borders that are draws of a standard normal; y is normalised."""
    return _classes(y, lambda count: rng.standard_normal(count - 1), most, ordered, rng)


def _classes(y: np.ndarray, borders: Callable[[int], np.ndarray], most: int, ordered: float, rng: Generator) -> np.ndarray:
    """Half of all have two classes. The classes keep the order of y with probability `ordered`, and are then reversed as often as not."""
    count = round(rng.uniform(2, most)) if rng.random() > 0.5 else 2
    label = (y[:, None] > borders(count)[None]).sum(1)
    if rng.random() > ordered:
        label = rng.permutation(count)[label]
    return count - 1 - label if rng.random() > 0.5 else label


def _compatible(x: np.ndarray, label: np.ndarray, context: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows reordered until the context and the rest have the same classes, two at least; up to ten tries."""
    for _ in range(11):
        before, after = np.unique(label[:context]), np.unique(label[context:])
        if len(before) > 1 and np.array_equal(before, after):
            return x, label
        order = rng.permutation(len(x))
        x, label = x[order], label[order]
    return x, np.full(len(x), IGNORED)


def _renumbered(label: np.ndarray, rng: Generator) -> np.ndarray:
    """The classes that occur as 0, 1, ..., their numbers turned by a random shift."""
    if label[0] == IGNORED:
        return label.astype(np.int64)
    values, ranks = np.unique(label, return_inverse=True)
    return ((ranks + rng.integers(len(values))) % len(values)).astype(np.int64)


# hyperparameters ------------------------------------------------------------------------------------------------------


def _identity(x: np.ndarray) -> np.ndarray:
    return x


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def _choose(values: tuple[Any, ...], rng: Generator, low: float = -3.0, high: float = 5.0) -> Any:
    """One of the values: the first has log odds 1, each other log odds uniform in [low, high]."""
    odds = [math.e, *(math.exp(rng.uniform(low, high)) for _ in values[1:])]
    left = rng.random() * sum(odds)
    for value, share in zip(values, odds, strict=True):
        left -= share
        if left < 0:
            return value
    return values[-1]


def _gamma(most_shape: float, most_mean: float, rng: Generator) -> float:
    """A gamma variate of a log-uniform shape in [1, most_shape] and a uniform mean in [0, most_mean]."""
    shape = math.exp(rng.uniform(0, math.log(most_shape)))
    return rng.gamma(shape, rng.uniform(0, most_mean) / shape)


def _log_normal(low: float, high: float, rng: Generator) -> float:
    """A normal variate cut off below 0: log-uniform mean in [low, high], relative deviation log-uniform in [0.01, 1]."""
    mean, relative = math.exp(rng.uniform(math.log(low), math.log(high))), math.exp(rng.uniform(math.log(0.01), 0))
    floor = ndtr(-1 / relative)
    return mean * (1 + relative * float(ndtri(floor + (1 - floor) * rng.random())))
