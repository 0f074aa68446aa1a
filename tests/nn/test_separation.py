import math

import torch

from formarium.nn.separation import best_order, fit_levels, in_chunks, pit_si_sdr, reorder, si_sdr


def waves(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_si_sdr_of_known_noise_and_its_invariances():
    reference, noise = waves(4000), waves(4000, seed=1)
    reference, noise = reference - reference.mean(), noise - noise.mean()
    noise = noise - (noise @ reference) / (reference @ reference) * reference  # at right angles
    noise = noise * reference.norm() / noise.norm() / 10  # 20 dB below
    value = si_sdr(reference + noise, reference)
    assert math.isclose(value.item(), 20, abs_tol=1e-3)
    for other in (3 * (reference + noise), reference + noise + 0.7):
        torch.testing.assert_close(si_sdr(other, reference), value, atol=1e-3, rtol=0)


def test_si_sdr_is_torchmetrics_s():
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    a, b = waves(3, 500), waves(3, 500) + 0.5 * waves(3, 500, seed=2)
    torch.testing.assert_close(si_sdr(b, a), scale_invariant_signal_distortion_ratio(b, a, zero_mean=True), atol=1e-3, rtol=1e-4)


def test_the_best_order_is_found_and_undone():
    sources = waves(2, 3, 400)
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    mixed_up = reorder(sources, order)
    value, found = pit_si_sdr(mixed_up, sources)
    assert (value > 60).all()
    torch.testing.assert_close(reorder(mixed_up, found), sources)
    scores = torch.tensor([[[1.0, 5.0], [0.0, 3.0]]])
    best, which = best_order(scores)  # 5 + 0 over 1 + 3
    assert best.item() == 2.5 and which.tolist() == [[1, 0]]


def test_silence_has_a_finite_gradient():
    estimate = torch.zeros(1, 2, 100, requires_grad=True)
    pit_si_sdr(estimate, waves(1, 2, 100))[0].sum().backward()
    assert torch.isfinite(estimate.grad).all()


def test_levels_are_fitted_to_the_mixture():
    sources = waves(2, 2, 300)
    fitted = fit_levels(sources * torch.tensor([5.0, -0.1])[:, None], sources.sum(1))
    torch.testing.assert_close(fitted, sources, atol=1e-3, rtol=1e-3)


def test_chunks_keep_the_order_of_the_speakers():
    t = torch.arange(5000) / 100
    low, high = torch.sin(t), 0.5 * torch.sin(7 * t)
    calls = []

    def separate(mixture):  # a perfect separator whose order is another each time
        start = 0 if not calls else starts[len(calls)]
        calls.append(mixture.shape[1])
        both = torch.stack([low, high])[None, :, start : start + mixture.shape[1]]
        return both if len(calls) % 2 else both.flip(1)

    starts = [*range(0, 5000 - 1500, 1200), 3500]
    out = in_chunks(separate, (low + high)[None], 1500, 300)
    assert out.shape == (1, 2, 5000) and calls == [1500] * len(starts)
    torch.testing.assert_close(out[0], torch.stack([low, high]), atol=1e-5, rtol=1e-5)


def test_a_short_recording_is_one_piece():
    assert in_chunks(lambda x: torch.stack([x, -x], 1), waves(1, 50), 100, 10).shape == (1, 2, 50)
