"""What every classifier of time series shares: the batch it takes, its loss, its prediction, its checks.

A batch holds
    series  float32 [batch, channels, length], in the data's own units
    label   int64 [batch], class indices                            (training and evaluation)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Losses, Model, check_tensor


class Match(NamedTuple):
    """A stretch of a series that a model points at: series[channel, start:end] is near to what it knows of a class; less distance,
    nearer."""

    channel: int
    start: int
    end: int
    label: int
    distance: float


class SeriesLabels(NamedTuple):
    """probabilities: float32 [batch, classes], rows summing to 1. label: int64 [batch], the likeliest class. matches: for each sample, the
    stretches that the model compared, nearest first; empty for models that point at none."""

    probabilities: Tensor
    label: Tensor
    matches: list[list[Match]]


class SeriesClassifier(Model):
    """Config has at least `num_classes`, `channels`, `length`. `forward` takes normalised series [batch, channels, length] and returns
    logits [batch, classes]. Where `Config.standardise` is set, `study` measures each channel's mean and deviation, which `normalise`
    then uses."""

    task = "time-series-classification"
    mean: Tensor
    std: Tensor

    def __init__(self, config: Any):
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(config.channels, 1))
        self.register_buffer("std", torch.ones(config.channels, 1))

    def normalise(self, series: Tensor) -> Tensor:
        return (series - self.mean) / self.std

    def forward_batch(self, batch: Batch) -> Tensor:
        return self(self.normalise(batch["series"]))

    def loss(self, batch: Batch) -> Losses:
        loss = F.cross_entropy(self.forward_batch(batch).float(), batch["label"])
        return Losses(loss, {"cross_entropy": loss})

    def matches(self, series: Tensor) -> list[list[Match]]:
        """What `SeriesLabels.matches` says, of normalised series."""
        return [[] for _ in range(len(series))]

    def predict(self, batch: Batch) -> SeriesLabels:
        series = self.normalise(batch["series"])
        logits = self(series).float()
        return SeriesLabels(logits.softmax(-1), logits.argmax(-1), self.matches(series))

    def example(self, batch: int = 1, length: int | None = None) -> tuple[Tensor, ...]:
        return (torch.randn(batch, self.config.channels, length or self.config.length, device=self.device),)

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        return {f"{length} points": self.example(2, length) for length in (self.config.length + 7, self.config.length - 3, 4)}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        """Noise, and in each series a bump whose place says the class."""
        g, c = torch.Generator().manual_seed(seed), self.config
        series, label = torch.randn(batch, c.channels, c.length, generator=g), torch.arange(batch) % c.num_classes
        width = max(1, c.length // c.num_classes)
        for i, k in enumerate(label.tolist()):
            series[i, 0, k * width : (k + 1) * width] += 2
        return {"series": series.to(self.device), "label": label.to(self.device), "id": [f"example {i}" for i in range(batch)]}

    def check_input(self, series: Any) -> None:
        check_tensor("series", series, "batch channels length", sizes={1: self.config.channels})
        self.check_length(series.shape[2])

    def check_length(self, length: int) -> None:
        """Raise BadInput where the network can't take series of this length."""
        if length != self.config.length:
            raise BadInput("series", expected=f"{self.config.length} points", got=str(length), fix="cut, pad or resample it")
