"""How well a model's features predict neurons (Brain-Score, Schrimpf et al. 2018): cross-validated regression, relative to what the noise
in the recordings allows. Recordings belong to their laboratories; here neurons can be simulated, so that the ceiling is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formarium.errors import BadInput, UnknownName
from formarium.features import taps, trace
from formarium.model import evaluating


@dataclass(frozen=True)
class Neurons:
    """images: float32 [stimuli, 3, h, w] in [0, 1]; responses: float64 [stimuli, neurons]; ceiling: float64 [neurons], the correlation that
    a perfect model would reach."""

    images: Tensor
    responses: np.ndarray
    ceiling: np.ndarray


def gabor_bank(size: int, orientations: int = 8, wavelengths: tuple[float, ...] = (4.0, 7.0)) -> np.ndarray:
    """Even and odd filters, float [orientations * wavelengths, 2, size, size], each of mean 0 and norm 1."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    filters = []
    for wavelength in wavelengths:
        for angle in np.arange(orientations) * np.pi / orientations:
            u, envelope = x * np.cos(angle) + y * np.sin(angle), np.exp(-(x**2 + y**2) / (2 * (0.5 * wavelength) ** 2))
            pair = np.stack([envelope * np.cos(2 * np.pi * u / wavelength), envelope * np.sin(2 * np.pi * u / wavelength)])
            pair -= pair.mean((1, 2), keepdims=True)
            filters.append(pair / np.linalg.norm(pair, axis=(1, 2), keepdims=True))
    return np.stack(filters)


def simulate(images: Tensor, neurons: int = 48, reliability: float = 0.6, seed: int = 0) -> Neurons:
    """Neurons that read a hidden bank of Gabor energies, pooled over 2 x 2 regions, by random sparse weights; noise is added until a share
    `reliability` of each one's variance is signal, so its ceiling is sqrt(reliability).

    images: float [stimuli, 3, h, w] in [0, 1]. Raises BadInput for a reliability outside (0, 1].
    """
    if not 0 < reliability <= 1:
        raise BadInput("reliability", expected="above 0, at most 1", got=str(reliability))
    rng = np.random.default_rng(seed)
    grey = images.float().mean(1, keepdim=True)
    bank = torch.from_numpy(gabor_bank(11)).float()
    maps = torch.nn.functional.conv2d(grey, bank.flatten(0, 1)[:, None], padding=5)
    energy = maps.unflatten(1, (-1, 2)).square().sum(2).sqrt()
    hidden = torch.nn.functional.adaptive_avg_pool2d(energy, 2).flatten(1).double().numpy()
    hidden = (hidden - hidden.mean(0)) / (hidden.std(0) + 1e-9)
    weights = rng.normal(size=(hidden.shape[1], neurons)) * (rng.random((hidden.shape[1], neurons)) < 0.2)
    weights[rng.integers(hidden.shape[1], size=neurons), np.arange(neurons)] += 1  # none reads nothing
    signal = hidden @ weights
    signal = (signal - signal.mean(0)) / (signal.std(0) + 1e-12)
    noise = rng.normal(size=signal.shape) * np.sqrt((1 - reliability) / reliability)
    return Neurons(images, signal + noise, np.full(neurons, np.sqrt(reliability)))


def predictivity(
    features: np.ndarray, neurons: Neurons, *, method: str = "pls", components: int = 25, pca: int = 200, folds: int = 5, seed: int = 0
) -> float:
    """Median over neurons of the cross-validated Pearson correlation, divided by the neuron's ceiling.

    features: float [stimuli, width]; they are reduced to at most `pca` principal components, found on each fold's training part. method:
    "pls" (partial least squares, `components` of them, Brain-Score's) or "ridge". Raises BadInput where the numbers of stimuli differ.
    """
    from sklearn.cross_decomposition import PLSRegression
    from sklearn.decomposition import PCA
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(features) != len(neurons.responses):
        raise BadInput("features", expected=f"{len(neurons.responses)} stimuli", got=str(len(features)))
    if method not in ("pls", "ridge"):
        raise UnknownName("method", method, ("pls", "ridge"))
    said = np.zeros_like(neurons.responses)
    for train, held in KFold(folds, shuffle=True, random_state=seed).split(features):
        kept = min(pca, len(train) - 1, features.shape[1])
        reader: Any = PLSRegression(min(components, kept), scale=False) if method == "pls" else RidgeCV(np.logspace(-1, 5, 13))
        steps = make_pipeline(StandardScaler(), PCA(kept, random_state=seed), reader)
        said[held] = steps.fit(features[train], neurons.responses[train]).predict(features[held])
    a, b = said - said.mean(0), neurons.responses - neurons.responses.mean(0)
    r = (a * b).sum(0) / np.maximum(np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0), 1e-12)
    return float(np.median(r / neurons.ceiling))


@torch.no_grad()
def brain_score(model: Any, neurons: Neurons, *, at: str = "*blocks.*", batch: int = 64, **how: Any) -> dict[str, float]:
    """Predictivity of every layer that a glob over taps names, each by its tokens' mean and their 2 x 2 regional means where they lie on a
    grid; the model's mode is left as it was."""
    names, read = [*taps(model, at)], {}
    if not names:
        raise BadInput("at", expected="a glob that a tap's name matches", got=at)
    with evaluating(model):
        for start in range(0, len(neurons.images), batch):
            image = model.normalise(neurons.images[start : start + batch].to(model.device))
            for name, feature in trace(model, image, at=at).items():
                x = feature.tokens[:, feature.prefix :]
                if feature.grid is not None and len(feature.grid) == 2 and min(feature.grid) >= 2:
                    grid = x.transpose(1, 2).unflatten(2, feature.grid)
                    x = torch.nn.functional.adaptive_avg_pool2d(grid, 2).flatten(1)
                else:
                    x = x.mean(1)
                read.setdefault(name, []).append(x.double().cpu().numpy())
    return {name: predictivity(np.concatenate(parts), neurons, **how) for name, parts in read.items()}
