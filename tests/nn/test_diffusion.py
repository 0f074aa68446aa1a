import math
import sys

import numpy as np
import pytest
import torch

from formarium.errors import BadInput, MissingExtra, UnknownName
from formarium.nn.diffusion import (
    PREDICTIONS,
    SCHEDULES,
    GaussianDiffusion,
    beta_schedule,
    discretised_log_likelihood,
    sincos_grid,
    sincos_table,
    spaced_steps,
    timestep_features,
)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_from_signal_to_noise(name):
    for steps in (100, 1000):
        betas = beta_schedule(name, steps)
        abar = np.cumprod(1 - betas)
        assert betas.shape == (steps,) and (betas > 0).all() and (betas < 1).all() and (np.diff(abar) < 0).all()
        assert abar[0] > 0.98 and abar[-1] < 0.01
    with pytest.raises(UnknownName, match="linear"):
        beta_schedule("liner")


def test_the_linear_schedule_has_its_published_ends():
    betas = beta_schedule("linear")
    assert betas[0] == pytest.approx(1e-4) and betas[-1] == pytest.approx(0.02)


def test_spaced_steps():
    assert spaced_steps(10, 4) == [0, 3, 6, 9] and spaced_steps(10, 1) == [0] and spaced_steps(1000, 1000) == [*range(1000)]
    assert spaced_steps(1000, "ddim50") == [*range(0, 1000, 20)]
    assert spaced_steps(300, "10,15,20")[:2] == [0, 11] and len(spaced_steps(300, [10, 15, 20])) == 45
    for wrong in (0, 11, "ddim7", "6,6"):
        with pytest.raises(BadInput, match="steps"):
            spaced_steps(10, wrong)


def test_a_spaced_process_has_the_same_signal_at_its_steps():
    whole = GaussianDiffusion(beta_schedule("linear", 100), "epsilon", "learned_range")
    short = whole.spaced(7)
    assert len(short) == 7 and short.variance == "learned_range"
    np.testing.assert_allclose(short.abar, whole.abar[short.timesteps], rtol=1e-12)
    assert short.known_as(torch.tensor([0, 6])).tolist() == [0, 99]


def test_q_sample_has_the_stated_mean_and_deviation():
    d, x0 = GaussianDiffusion(beta_schedule("linear")), torch.full((2, 40_000), 0.7)
    t = torch.tensor([10, 400])
    x = d.q_sample(x0, t, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)))
    for row, step in zip(x, t, strict=True):
        assert row.mean().item() == pytest.approx(0.7 * math.sqrt(d.abar[step]), abs=0.02)
        assert row.std().item() == pytest.approx(math.sqrt(1 - d.abar[step]), rel=0.02)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_gives_back_the_clean_sample(prediction):
    d = GaussianDiffusion(beta_schedule("cosine", 50), prediction)
    x0, noise, t = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 20, 40])
    x_t = d.q_sample(x0, t, noise)
    target = d.target(x0, noise, t)
    torch.testing.assert_close(d.to_start(target, x_t, t), x0, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(d.to_epsilon(x0, x_t, t), noise, atol=1e-3, rtol=1e-3)
    assert d.losses(target, None, x0, x_t, t, noise).keys() == {"mse"}
    assert d.losses(target, None, x0, x_t, t, noise)["mse"].max() == 0


def test_the_posterior_is_bayes():
    d = GaussianDiffusion(beta_schedule("linear", 20))
    x0, x_t, t = torch.tensor([[0.3]]), torch.tensor([[-0.8]]), torch.tensor([7])
    beta, before = d.betas[7], d.abar[6]
    # N(x; sqrt(before) x0, 1 - before) * N(x_t; sqrt(1 - beta) x, beta), normalised
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (math.sqrt(before) * 0.3 / (1 - before) + math.sqrt(1 - beta) * -0.8 / beta) / precision
    said, log_variance = d.q_posterior(x0, x_t, t)
    assert said.item() == pytest.approx(mean, rel=1e-5) and log_variance.exp().item() == pytest.approx(1 / precision, rel=1e-5)


def test_learned_variances_lie_between_their_bounds():
    d = GaussianDiffusion(beta_schedule("linear", 20), "epsilon", "learned_range")
    x, t, zero = torch.randn(1, 4), torch.tensor([9]), torch.zeros(1, 4)
    low, high = (d.reverse(zero, torch.full((1, 4), v), x, t).log_variance for v in (-1.0, 1.0))
    torch.testing.assert_close(high.exp(), torch.full((1, 4), float(d.betas[9])))
    torch.testing.assert_close(low, d.q_posterior(x, x, t)[1].expand(1, 4))
    with pytest.raises(BadInput, match="variance values"):
        d.reverse(zero, None, x, t)


def test_the_bound_is_zero_for_the_true_posterior_and_leaves_the_mean_alone():
    d = GaussianDiffusion(beta_schedule("linear", 20), "epsilon", "learned_range")
    x0, noise, t = torch.rand(1, 6) * 2 - 1, torch.randn(1, 6), torch.tensor([9])
    x_t = d.q_sample(x0, t, noise)
    values = torch.full((1, 6), -1.0, requires_grad=True)  # the posterior's own variance
    said = noise.clone().requires_grad_()
    assert d.bound(noise, values, x0, x_t, t).abs().item() < 1e-4
    d.losses(said, values, x0, x_t, t, noise)["vb"].backward()
    assert said.grad is None and values.grad is not None


def test_eight_bit_likelihoods_sum_to_one():
    values = (torch.arange(256) / 127.5 - 1)[:, None]
    total = discretised_log_likelihood(values, torch.full_like(values, 0.2), torch.full_like(values, -2.0)).exp().sum()
    assert total.item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samplers_find_a_known_distribution(prediction, sampler):
    """Data are N(0.5, 0.3^2): the best prediction is known in closed form, so the sampler must reproduce mean and deviation."""
    whole = GaussianDiffusion(beta_schedule("linear", 200), prediction, "fixed_small")

    def network(x, t):
        abar = torch.from_numpy(whole.abar)[t].float()[:, None]
        gain = abar.sqrt() * 0.09 / (abar * 0.09 + 1 - abar)
        x0 = 0.5 + gain * (x - abar.sqrt() * 0.5)
        eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        return {"epsilon": eps, "start": x0, "v": abar.sqrt() * eps - (1 - abar).sqrt() * x0}[prediction], None

    g = torch.Generator().manual_seed(1)
    x = torch.randn(10_000, 1, generator=g)
    short = whole.spaced(150)
    out = short.ddpm(network, x, generator=g) if sampler == "ddpm" else short.ddim(network, x, generator=g)
    assert out.mean().item() == pytest.approx(0.5, abs=0.02) and out.std().item() == pytest.approx(0.3, rel=0.08)
    if sampler == "ddim":
        assert torch.equal(out, short.ddim(network, x))
        noisy = short.ddim(network, x, eta=1.0, generator=g)
        assert not torch.equal(out, noisy) and noisy.std().item() == pytest.approx(0.3, rel=0.08)


def test_clipping_holds_the_sample_in_range():
    d = GaussianDiffusion(beta_schedule("linear", 20))
    out = d.ddim(lambda x, t: (torch.zeros_like(x), None), torch.randn(4, 3) * 5, clip=True)
    assert out.abs().max() <= 1


def test_dpm_solver_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match="diffusers"):
        GaussianDiffusion(beta_schedule("linear")).dpm_solver(lambda x, t: (x, None), torch.randn(1, 2))


def test_dpm_solver_agrees_with_ddim():
    pytest.importorskip("diffusers")
    d = GaussianDiffusion(beta_schedule("linear"))

    def network(x, t):
        abar = torch.from_numpy(d.abar)[t].float()[:, None]
        x0 = 0.5 + abar.sqrt() * 0.09 / (abar * 0.09 + 1 - abar) * (x - abar.sqrt() * 0.5)
        return (x - abar.sqrt() * x0) / (1 - abar).sqrt(), None

    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(d.dpm_solver(network, x, 25), d.ddim(network, x), atol=0.05, rtol=0.1)


def test_tables():
    assert timestep_features(torch.tensor([0, 5]), 7).shape == (2, 7) and timestep_features(torch.tensor([0]), 4).tolist() == [[1, 1, 0, 0]]
    assert sincos_table(np.arange(3), 8).shape == (3, 8)
    grid = sincos_grid(2, 3, 8)
    np.testing.assert_allclose(grid[:, :4], sincos_table(np.array([0, 1, 2, 0, 1, 2]), 4))  # columns first
    np.testing.assert_allclose(grid[:, 4:], sincos_table(np.array([0, 0, 0, 1, 1, 1]), 4))
    with pytest.raises(UnknownName, match="prediction"):
        GaussianDiffusion(beta_schedule("linear"), "eps")
