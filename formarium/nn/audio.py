"""Sound as spectra: mel filters, log-mel features of a whole utterance, and the masks of SpecAugment."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def hz_to_mel(hz: Tensor) -> Tensor:
    """The HTK mel scale, 1127 ln(1 + hz / 700)."""
    return 1127.0 * torch.log1p(hz / 700.0)


@lru_cache(maxsize=8)
def mel_filters(sample_rate: int, n_fft: int, mels: int, low: float = 0.0, high: float | None = None) -> Tensor:
    """Triangular filters, float32 [n_fft / 2 + 1, mels]: linear on the mel scale, peak 1, none of them takes the constant (bin 0).

    sample_rate, low, high: hertz; high is half the sample rate by default.
    """
    top = sample_rate / 2 if high is None else high
    bins = hz_to_mel(torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64))[:, None]
    ends = hz_to_mel(torch.tensor([low, top], dtype=torch.float64))
    edges = torch.linspace(ends[0].item(), ends[1].item(), mels + 2, dtype=torch.float64)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    weights = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp_min(0)
    weights[0] = 0
    return weights.float()


def power_spectrogram(audio: Tensor, n_fft: int, hop: int, window: int) -> Tensor:
    """|STFT|^2 with a periodic Hann window, mirrored at the ends: float [..., samples] -> [..., frames, n_fft / 2 + 1].

    window <= n_fft is centred in each frame; there are 1 + samples // hop frames. Needs more than n_fft / 2 samples.
    """
    hann = torch.hann_window(window, periodic=True, dtype=audio.dtype, device=audio.device)
    spectrum = torch.stft(audio, n_fft, hop, window, hann, center=True, pad_mode="reflect", return_complex=True)
    return spectrum.abs().square().transpose(-1, -2)


def preemphasis(audio: Tensor, coefficient: float) -> Tensor:
    """y[t] = x[t] - coefficient * x[t - 1]; the first sample stays."""
    return torch.cat([audio[..., :1], audio[..., 1:] - coefficient * audio[..., :-1]], -1)


def decibels(power: Tensor, floor: float = 1e-10, range_db: float | None = 80.0) -> Tensor:
    """10 log10(power), not below `floor`, nor more than `range_db` below the loudest value of the whole tensor."""
    db = 10.0 * torch.log10(power.clamp_min(floor))
    return db if range_db is None else torch.maximum(db, db.max() - range_db)


def log_mel(
    audio: Tensor,
    sample_rate: int = 16000,
    mels: int = 80,
    window_ms: float = 25.0,
    hop_ms: float = 10.0,
    emphasis: float = 0.97,
    range_db: float = 80.0,
) -> Tensor:
    """Features of one utterance: float [samples] in [-1, 1] -> [frames, mels], mean 0 and variance 1 over the whole of it.

    The loudest sample is scaled to 1, high frequencies are raised, and the power spectrum (Hann window, FFT size the next power of two)
    is summed in mel bands and put in decibels. frames = 1 + samples // hop.
    """
    window, hop = int(sample_rate * window_ms / 1000), int(sample_rate * hop_ms / 1000)
    n_fft = 2 ** math.ceil(math.log2(window))
    audio = preemphasis(audio / (audio.abs().max() + 1e-9), emphasis)
    power = power_spectrogram(audio, n_fft, hop, window)
    db = decibels(power @ mel_filters(sample_rate, n_fft, mels).to(power), range_db=range_db)
    return (db - db.mean()) / (db.var(correction=0) + 1e-9).sqrt()


def spec_augment(
    features: np.ndarray,
    rng: np.random.Generator,
    time_masks: int = 5,
    time_share: float = 0.05,
    frequency_masks: int = 2,
    frequency_width: int = 27,
) -> np.ndarray:
    """SpecAugment's masks (Park et al. 2019, without time warping): features [frames, mels] with bands of time and frequency set to 0.

    Each time mask is up to `time_share` of the utterance long, each frequency mask up to `frequency_width` channels wide; 0 is the mean
    of normalised features.
    """
    out, (frames, mels) = features.copy(), features.shape
    for _ in range(time_masks):
        width = int(frames * rng.uniform(0, time_share))
        start = int((frames - width) * rng.random())
        out[start : start + width] = 0
    for _ in range(frequency_masks):
        width = int(rng.integers(0, max(1, min(frequency_width, mels))))
        start = int((mels - width) * rng.random())
        out[:, start : start + width] = 0
    return out
