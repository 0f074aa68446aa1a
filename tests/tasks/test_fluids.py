import numpy as np
import pytest

from formarium.tasks.operator_learning import fluids
from formarium.tasks.operator_learning.symbols import divided, fluid_vocabulary, parse

X = 2 * np.pi * np.arange(32) / 32
T = np.arange(4) * 0.3


def test_a_vortex_array_only_decays():
    """Taylor, Green: w = 2 cos x cos y keeps its shape, exp(-2 eta t)."""
    w = 2 * np.cos(X[None]) * np.cos(X[:, None])
    eta = np.array([0.05])
    found = fluids.smoke(w[None], np.ones((1, 32, 32)), eta, T)[0]
    fade = np.exp(-2 * 0.05 * T)[:, None, None]
    np.testing.assert_allclose(found[..., 0], -np.cos(X[None]) * np.sin(X[:, None]) * fade, atol=1e-6)
    np.testing.assert_allclose(found[..., 1], np.sin(X[None]) * np.cos(X[:, None]) * fade, atol=1e-6)
    np.testing.assert_allclose(found[..., 2], 1, atol=1e-10)


def test_smoke_in_a_shear_is_carried_along():
    """u = -sin y stands (eta = 0); smoke without spread at height y moves by u t."""
    found = fluids.smoke(np.cos(X[:, None] + 0 * X[None])[None], np.cos(X[None] + 0 * X[:, None])[None], np.array([0.0]), T, spread=0.0)[0]
    np.testing.assert_allclose(found[..., 0], (-np.sin(X[:, None]) + 0 * X[None])[None] + 0 * found[..., 0], atol=1e-6)
    np.testing.assert_allclose(found[..., 2], np.cos(X[None, None] + np.sin(X[None, :, None]) * T[:, None, None]), atol=1e-5)


@pytest.fixture(scope="module")
def flow():
    rng = np.random.default_rng(0)
    return fluids.random_field(rng, 32, 3)[None], 1 + 0.5 * fluids.random_field(rng, 32, 2)[None]


def test_no_divergence_and_what_is_kept(flow):
    found, at = fluids.smoke(2.5 * flow[0], flow[1], np.array([0.02]), T)[0], fluids.Square(32)
    u, v, c = np.moveaxis(found, -1, 0)
    assert np.abs(at.slopes(at.waves(u))[0] + at.slopes(at.waves(v))[1]).max() < 1e-10
    np.testing.assert_allclose(c.mean((1, 2)), 1, atol=1e-10)
    energy = (u**2 + v**2).mean((1, 2)) / 2
    short = fluids.smoke(2.5 * flow[0], flow[1], np.array([0.02]), np.array([0, 0.001]))[0]
    vorticity = 2.5 * flow[0][0]
    rate = np.diff((short[..., 0] ** 2 + short[..., 1] ** 2).mean((1, 2)) / 2)[0] / 0.001
    assert rate == pytest.approx(-0.02 * (vorticity**2).mean(), rel=1e-3) and (np.diff(energy) < 0).all()


def test_a_finer_square_changes_little(flow):
    kx = [np.fft.rfft2(f[0]) for f in flow]
    wide = np.zeros((2, 64, 33), dtype=complex)
    for k, w in enumerate(kx):
        wide[k, :16, :16], wide[k, -15:, :16] = 4 * w[:16, :16], 4 * w[-15:, :16]
    fine = np.fft.irfft2(wide, (64, 64))
    np.testing.assert_allclose(fine[:, ::2, ::2], np.stack([flow[0][0], flow[1][0]]), atol=1e-9)
    usual = fluids.smoke(2.5 * flow[0], flow[1], np.array([0.02]), T)[0]
    finer = fluids.smoke(2.5 * fine[:1], fine[1:], np.array([0.02]), T)[0][:, ::2, ::2]
    assert np.linalg.norm(usual - finer) < 0.01 * np.linalg.norm(finer)


def test_low_water_waves_swing_at_the_root_of_their_depth():
    """Small waves on a level of 1: h - 1 = a cos(x) cos(t sqrt(g)), eta = 0."""
    g, a = np.array([2.0]), 1e-4
    found = fluids.water((1 + a * np.cos(X[None] + 0 * X[:, None]))[None], g, T, eta=0.0)[0]
    exact = a * np.cos(X[None, None]) * np.cos(np.sqrt(2.0) * T)[:, None, None] + 0 * found[..., 0]
    np.testing.assert_allclose(found[..., 0] - 1, exact, atol=3e-3 * a)


def test_water_is_kept_and_energy_falls():
    h = 1 + 0.1 * fluids.random_field(np.random.default_rng(1), 32, 2)[None]
    found = fluids.water(h, np.array([2.0]), T)[0]
    np.testing.assert_allclose(found[..., 0].mean((1, 2)), h.mean(), atol=1e-10)
    depth, u, v = np.moveaxis(found, -1, 0)
    energy = (depth * (u**2 + v**2) / 2 + depth**2).mean((1, 2))
    assert (np.diff(energy) < 0).all() and energy[-1] > energy[0] - 0.01
    still = fluids.water(h, np.array([2.0]), T, eta=0.0)[0]
    depth, u, v = np.moveaxis(still, -1, 0)
    energy = (depth * (u**2 + v**2) / 2 + depth**2).mean((1, 2))
    np.testing.assert_allclose(energy, energy[0], atol=2e-5)


def test_samples():
    held = fluids.flows("val", 4, 0)
    assert [s["family"] for s in held] == ["smoke", "water"] * 2 and [s["dims"] for s in held] == [3, 1] * 2
    for s in held:
        assert s["u"].shape == (12, 256, 3) and np.isfinite(s["u"]).all()
        assert {*s["guess"]} <= {*fluid_vocabulary()} and len(parse(divided(s["guess"])[0])) in (2, 3)
    assert (held[1]["u"][..., 1:] == 0).all() and held[0]["guess"] != held[2]["guess"]
    again, other = fluids.flows("val", 4, 0), fluids.flows("val", 2, 1)
    assert np.array_equal(again[0]["u"], held[0]["u"]) and not np.array_equal(other[0]["u"], held[0]["u"])
