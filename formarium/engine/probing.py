"""linear_probe: what a linear classifier finds in a model's frozen features, the field's measure of what pre-training buys."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from formarium.engine.evaluation import split_of
from formarium.engine.runs import Run, as_model, data_for
from formarium.errors import BadInput
from formarium.features import trace
from formarium.model import Model, evaluating
from formarium.task import Data
from formarium.tasks.batches import batches_of, joined, on


def linear_probe(
    model: str | Path | Model | Run, data: str | Path | Data, *, at: str = "*features*", train: str = "train", split: str = "val",
    samples: int = 2000, strength: float = 1.0, seed: int = 0,
) -> float:  # fmt: skip
    """The held-out accuracy of logistic regression on standardised features, 0 to 1; the model isn't changed.

    model, data: as `evaluate` takes them. at: taps (globs); where several match, the last that is passed. Its tokens are pooled as the
    layer's own feature is: the class token where there is one, else their mean. train, split: where the probe learns, where it is scored.
    samples: at most so many of each, drawn by the seed. strength: the inverse of the L2 penalty.
    Raises BadInput where a split, its labels or the taps aren't there.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network = as_model(model)
    found = data_for(network, data)
    (x, label), (held, truth) = (_features(network, found, s, at, samples, seed) for s in (train, split))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float((probe.fit(x, label).predict(held) == truth).mean())


@torch.no_grad()
def _features(model: Model, data: Data, split: str, at: str, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    split_of(data, split)
    batches = batches_of(model, data, samples=samples, seed=seed, split=split)
    pooled = []
    with evaluating(model), torch.random.fork_rng([]):
        for batch in batches:
            found = [*trace(model, on(model.device, batch), at=at).values()]
            if not found:
                raise BadInput("at", expected="a glob that a tap's name matches", got=at)
            pooled.append(found[-1].pooled().float().cpu())
    return torch.cat(pooled).numpy(), joined(batches, "label").numpy()
