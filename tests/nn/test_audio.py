import numpy as np
import scipy.signal
import torch

from formarium.nn.audio import decibels, hz_to_mel, log_mel, mel_filters, power_spectrogram, preemphasis, spec_augment


def tone(hertz, seconds=0.5, rate=16000):
    return torch.sin(2 * np.pi * hertz * torch.arange(int(seconds * rate)) / rate)


def test_mel_filters_are_triangles_that_overlap_to_one():
    filters = mel_filters(16000, 512, 80)
    assert filters.shape == (257, 80) and filters.min() == 0 and filters.max() <= 1 and filters[0].sum() == 0
    assert (filters[:, 20:].max(0).values > 0.6).all()
    inside = filters.sum(1)[30:240]  # between the first and the last peak the slopes add up to one
    torch.testing.assert_close(inside, torch.ones_like(inside))
    peak = filters[:, 40].argmax() * 16000 / 512
    wanted = 700 * (np.exp(hz_to_mel(torch.tensor(8000.0)).item() * 41 / 81 / 1127) - 1)
    assert abs(peak - wanted) <= 16000 / 512


def test_the_spectrogram_is_scipy_s():
    x = torch.randn(1600, generator=torch.Generator().manual_seed(0))
    ours = power_spectrogram(x, 512, 160, 400)
    window = np.pad(scipy.signal.windows.hann(400, sym=False), 56)
    padded = np.pad(x.numpy(), 256, mode="reflect")
    frames = np.stack([padded[i : i + 512] * window for i in range(0, len(padded) - 511, 160)])
    np.testing.assert_allclose(ours.numpy(), np.abs(np.fft.rfft(frames)) ** 2, rtol=1e-3, atol=1e-3)


def test_a_tone_lights_its_band():
    for hertz in (300, 1000, 4000):
        band = log_mel(tone(hertz))[25].argmax().item()
        low, high = (700 * (np.exp(hz_to_mel(torch.tensor(8000.0)).item() * (band + i) / 81 / 1127) - 1) for i in (0, 2))
        assert low < hertz < high


def test_features_are_normalised_whatever_the_loudness():
    x = tone(500) + 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0))
    features = log_mel(x)
    assert features.shape == (51, 80)
    assert abs(features.mean()) < 1e-5 and abs(features.std() - 1) < 1e-3
    torch.testing.assert_close(log_mel(0.01 * x), features, atol=1e-3, rtol=1e-3)
    assert torch.isfinite(log_mel(torch.zeros(1600))).all()


def test_decibels_and_preemphasis():
    assert decibels(torch.tensor([1.0, 100.0, 1e-30])).tolist() == [0, 20, -60]
    assert preemphasis(torch.tensor([1.0, 1.0, 2.0]), 0.5).tolist() == [1, 0.5, 1.5]


def test_spec_augment_masks_bands_within_their_limits():
    x, rng = np.ones((200, 80), np.float32), np.random.default_rng(0)
    for _ in range(20):
        masked = spec_augment(x, rng, 1, 0.05, 0, 0) == 0
        assert masked.all(1).sum() <= 10 and (masked.all(1) == masked.any(1)).all()
        masked = spec_augment(x, rng, 0, 0, 2, 27) == 0
        assert masked.all(0).sum() <= 52 and (masked.all(0) == masked.any(0)).all()
    assert (x == 1).all() and (spec_augment(x, rng, 0, 0, 0, 0) == x).all()
    assert np.mean([(spec_augment(x, rng) == 0).mean() for _ in range(50)]) > 0.1
