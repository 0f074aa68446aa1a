"""The twenty families: each solver against something that doesn't come from it, and each family's words against its fields."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

from formarium.task import task as task_of
from formarium.tasks.operator_learning import families as fm
from formarium.tasks.operator_learning import solvers
from formarium.tasks.operator_learning.starts import LENGTH, bump, centres, density, drawn_waves, two_waves
from formarium.tasks.operator_learning.symbols import encode, infix, is_valid, parse

T = np.linspace(0, 2, 9)
WAVE = np.pi  # the longest wave's number on a line of length 2


def smooth(x):
    return 0.5 + 0.3 * np.sin(WAVE * x + 0.4)


def fields(name, numbers, start=smooth, times=T, points=128):
    return fm.FAMILIES[name].fields([start], np.array([numbers]), times, points)[0]


def off(said, true):
    return np.linalg.norm(said - true) / np.linalg.norm(true)


# words and fields are of one equation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fm.FAMILIES)
def test_fields_satisfy_their_words(name):
    """The words' left-hand side, derivatives by place by Fourier and by time by differences, is small beside its largest term (root mean
    squares: a limiter flattens the highest cell)."""
    family, rng, points, t, h = fm.FAMILIES[name], np.random.default_rng(3), 256, 0.1, 2e-3
    numbers = family.draw(rng)
    u = fields(name, numbers, times=np.array([0, t - h, t, t + h]), points=points)[1:]
    values = {"u_0": u[1], "u_t": (u[2] - u[0]) / (2 * h), "u_tt": (u[2] - 2 * u[1] + u[0]) / h**2, "x": centres(points)}
    values |= {"u_" + "x" * n: solvers.differentiate(u[1], n, LENGTH) for n in range(1, 5)}
    tree = family.tree(numbers)
    (said,) = parse(encode([tree], 3))
    inside = slice(40, -40) if name == "fplanck" else slice(None)  # its force jumps where the line closes

    def size(tree, values=values):
        return np.sqrt((tree.evaluate(values)[inside] ** 2).mean())

    largest = max(map(size, parts(tree)))
    assert size(tree) < 0.01 * largest and size(said) < 0.02 * largest  # three digits say it
    assert size(tree, {**values, "u_t": -values["u_t"], "u_tt": -values["u_tt"]}) > 0.2 * largest


def parts(tree):
    return [t for c in tree.children for t in parts(c)] if tree.value in ("add", "sub") else [tree]


LONG = ("cahnhilliard_1D", "conservation_sinflux", "burgers", "conservation_cubicflux", "inviscid_conservation_sinflux")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in fm.FAMILIES])
def test_a_finer_grid_changes_little(name):
    family, rng = fm.FAMILIES[name], np.random.default_rng(5)
    numbers = np.array([family.draw(rng) for _ in range(2)])
    starts, times = [family.start(rng) for _ in range(2)], np.array([0.0, 1.0, 2.0])
    usual, fine = (family.fields(starts, numbers, times, n) for n in (128, 384))
    fine = fine[..., 1::3]  # the same places
    assert np.isfinite(usual).all() and off(usual[:, 0], fine[:, 0]) < 1e-4
    if family.sharp:  # a shock a third of a cell further is as far off as its jump, so what counts is the area
        assert np.abs(usual - fine).sum() < 0.02 * np.abs(fine).sum()
    else:
        assert off(usual, fine) < 1e-3


# exact solutions --------------------------------------------------------------------------------------------------------


def test_waves_that_decay_travel_and_grow():
    x, k = centres(128), WAVE
    one = lambda x: np.sin(k * x)  # noqa: E731
    np.testing.assert_allclose(fields("heat", [3e-3], one), np.exp(-3e-3 * k**2 * T)[:, None] * np.sin(k * x), atol=1e-10)
    np.testing.assert_allclose(fields("advection", [0.5], one), np.sin(k * (x - 0.5 * T[:, None])), atol=1e-10)
    grown = np.exp((0.1 - 3e-3 * k**2) * T)[:, None] * np.sin(k * x)
    np.testing.assert_allclose(fields("diff_linearreact_1D", [3e-3, 0.1], one), grown, atol=1e-10)
    fading = np.exp(-0.01 / np.pi * k**2 * T)[:, None] * np.sin(k * (x - 1.1 * T[:, None]))
    np.testing.assert_allclose(fields("conservation_linearflux", [0.01, 1.1], one), fading, atol=1e-10)
    np.testing.assert_allclose(fields("wave", [0.5], one), np.cos(0.5 * k * T / 2)[:, None] * np.sin(k * x), atol=1e-10)
    pitch = np.sqrt(1.1**2 * k**2 + 0.1**2 * 1.1**4)
    np.testing.assert_allclose(fields("Klein_Gordon", [1.1, 0.1], one), np.cos(pitch * T / 2)[:, None] * np.sin(k * x), atol=1e-10)


@pytest.mark.parametrize(
    ("name", "numbers", "rate"),
    [
        ("diff_logisreact_1D", [3e-3, 1.1], lambda u: 1.1 * u * (1 - u)),
        ("diff_bistablereact_1D", [3e-3, 0.9, 0.3], lambda u: 0.9 * u * (1 - u) * (u - 0.3)),
        ("diff_squarelogisticreact_1D", [3e-3, 1.0], lambda u: (u * (1 - u)) ** 2),
    ],
)
def test_a_uniform_start_follows_the_reaction_alone(name, numbers, rate):
    exact = solve_ivp(lambda t, u: rate(u), (0, 2), [0.4], t_eval=T, rtol=1e-9, atol=1e-11).y[0]
    np.testing.assert_allclose(fields(name, numbers, lambda x: np.full_like(x, 0.4)), exact[:, None] + 0 * centres(128), atol=1e-6)


def test_a_bistable_front_travels_at_its_speed():
    """u = (1 - tanh z) / 2 with z = (x - speed t) / sqrt(8 nu / rho), speed = sqrt(rho nu / 2) (1 - 2 a)."""
    nu, rho, a = 1e-3, 1.0, 0.1
    speed, width = np.sqrt(rho * nu / 2) * (1 - 2 * a), np.sqrt(8 * nu / rho)
    exact = lambda x, t: (np.tanh((x - 0.5 + speed * t) / width) - np.tanh((x - 1.5 - speed * t) / width)) / 2  # noqa: E731
    found = fields("diff_bistablereact_1D", [nu, rho, a], lambda x: exact(x, 0.0))
    np.testing.assert_allclose(found, exact(centres(128), T[:, None]), atol=2e-3)


@pytest.mark.parametrize(
    ("name", "slope"),
    [
        ("inviscid_burgers", lambda u: u),
        ("inviscid_conservation_sinflux", np.cos),
        ("inviscid_conservation_cubicflux", lambda u: u**2),
    ],
)
def test_characteristics_before_a_shock(name, slope):
    k, t, x = 1.05, 0.4, centres(128)[::16]
    exact = [brentq(lambda u, x=x: u - smooth(x - k * slope(u) * t), 0, 1) for x in x]
    found = fields(name, [k], times=np.array([0, t]), points=256)[1]
    np.testing.assert_allclose(np.interp(x, centres(256), found), exact, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "flux"), [("inviscid_burgers", lambda u: u**2 / 2), ("inviscid_conservation_cubicflux", lambda u: u**3 / 3)]
)
def test_a_shock_travels_as_fast_as_its_jump_says(name, flux):
    """Rankine, Hugoniot: a step from 1 down to 0 travels at flux(1); the rise behind it spreads as a fan."""
    t = 0.8
    first, found = fields(name, [1.0], lambda x: ((x > 0.2) & (x < 1.0)) * 1.0, np.array([0, t]), 256)
    edge = centres(256)[np.nonzero(found > 0.5)[0].max()]
    assert edge == pytest.approx(1.0 + flux(1.0) * t, abs=0.01)
    assert found.min() > -1e-9 and found.max() < 1 + 1e-9 and found.mean() == pytest.approx(first.mean(), abs=1e-9)


def test_viscous_burgers_is_a_heat_equation_in_disguise():
    """Cole, Hopf: k u = -2 nu phi_x / phi with phi_t = nu phi_xx."""
    eps, k, t, points = 0.03, 1.0, 0.9, 256
    nu, x = eps / np.pi, centres(256)
    phi = np.exp(0.3 / WAVE * np.cos(WAVE * x) * k / (2 * nu))
    later = solvers.linear(phi[None], np.array([t]), -nu * solvers.waves_of(points, LENGTH)[None] ** 2 + 0j, LENGTH)[0, 0]
    exact = -2 * nu / k * solvers.differentiate(later, 1, LENGTH) / later
    assert off(fields("burgers", [eps, k], lambda x: 0.3 * np.sin(WAVE * x), np.array([0, t]), points)[1], exact) < 0.01


@pytest.mark.parametrize("m", [2, 3, 4])
def test_the_porous_medium_spreads_as_barenblatt_found(m):
    rate, first = 1 / (m + 1), 0.02
    height, bend = first ** (rate * (m - 1)), rate * (m - 1) / (2 * m)

    def exact(x, t):
        return t**-rate * np.maximum(height - bend * (x - 1) ** 2 * t ** (-2 * rate), 0) ** (1 / (m - 1))

    found = fields("porous_medium", [m], lambda x: exact(x, first), np.array([0, 1.0, 2.0]), 256)
    assert off(found[1], exact(centres(256), first + 0.05)) < 5e-3 and off(found[2], exact(centres(256), first + 0.1)) < 5e-3


def test_a_soliton_keeps_its_shape_and_speed():
    """u = 3 c / cosh((x - c t) sqrt(c) / (2 delta))^2."""
    delta, c = 0.022, 0.3
    exact = lambda x, t: sum(3 * c / np.cosh((x - 0.7 - c * t + w) * np.sqrt(c) / (2 * delta)) ** 2 for w in (-2, 0, 2))  # noqa: E731
    found = fields("kdv", [delta], lambda x: exact(x, 0.0), T, 128)
    assert off(found[-1], fm.coarse(exact(centres(256), 1.0), 128)) < 2e-3


def test_a_uniform_sine_gordon_field_swings_as_a_pendulum():
    exact = solve_ivp(lambda t, s: (s[1], -1.1 * np.sin(s[0])), (0, 1), [0.9, 0], t_eval=T / 2, rtol=1e-9, atol=1e-11).y[0]
    np.testing.assert_allclose(fields("Sine_Gordon", [1.1], lambda x: np.full_like(x, 0.9)), exact[:, None] + 0 * centres(128), atol=1e-5)


def test_drift_and_diffusion_come_to_boltzmanns_distribution():
    points, spread = 128, np.array([1.7])
    well = lambda x: 0.8 * np.cos(WAVE * x) + 0.3 * np.sin(2 * WAVE * x)  # noqa: E731
    faces = (np.arange(points) + 1) * LENGTH / points
    fall = 0.8 * WAVE * np.sin(WAVE * faces) - 0.6 * WAVE * np.cos(2 * WAVE * faces)  # minus the well's slope
    start = np.random.default_rng(0).uniform(size=(1, points))
    found = solvers.drift_and_diffusion(start, np.array([0.0, 0.01, 3.0]), fall, spread, LENGTH)[0]
    rest = np.exp(-well(centres(points)))
    np.testing.assert_allclose(found[2] / found[2].sum(), rest / rest.sum(), rtol=2e-3)
    np.testing.assert_allclose(found.sum(1), start.sum(), rtol=1e-10)
    assert (found > 0).all()


# what is kept, and what falls ---------------------------------------------------------------------------------------------

CONSERVED = [
    *("heat", "porous_medium", "advection", "kdv", "fplanck", "burgers", "conservation_linearflux", "conservation_sinflux"),
    *("conservation_cubicflux", "inviscid_burgers", "inviscid_conservation_sinflux", "inviscid_conservation_cubicflux", "cahnhilliard_1D"),
]


@pytest.mark.parametrize("name", CONSERVED)
def test_mass_is_kept(name):
    family, rng = fm.FAMILIES[name], np.random.default_rng(1)
    numbers = np.array([family.draw(rng) for _ in range(3)])
    mass = family.fields([family.start(rng) for _ in range(3)], numbers, np.array([0, 0.7, 2.0]), 128).mean(-1)
    np.testing.assert_allclose(mass, mass[:, :1] + 0 * mass, rtol=0, atol=1e-6 if name == "advection" else 1e-9)


def test_energies():
    start = two_waves(np.random.default_rng(2), 0.5)
    squares = (fields("kdv", [0.022], start) ** 2).sum(1)
    np.testing.assert_allclose(squares, squares[0], rtol=2e-3)

    u = fields("Sine_Gordon", [1.0], smooth, np.array([0.0, 1.0, 1.002, 1.998, 2.0]))
    energy = []
    for a, b in ((1, 2), (3, 4)):  # two states 0.001 apart in time
        middle, speed = (u[a] + u[b]) / 2, (u[b] - u[a]) / 0.001
        energy.append((speed**2 / 2 + solvers.differentiate(middle, 1, LENGTH) ** 2 / 2 + 1 - np.cos(middle)).mean())
    first = (solvers.differentiate(u[0], 1, LENGTH) ** 2 / 2 + 1 - np.cos(u[0])).mean()
    np.testing.assert_allclose(energy, first, rtol=1e-4)

    u = fields("cahnhilliard_1D", [0.01], drawn_waves(np.random.default_rng(4), 2, 2), T[:5] / 8)
    slope = (np.roll(u, -1, 1) - u) * 64
    free = (u**3 + 0.01**2 / 2 * slope**2).mean(1)  # whose variation is 3 u^2 - eps^2 u_xx
    assert free[1] < free[0] - 0.01 and (np.diff(free) < 1e-12).all()


def test_sharp_fields_stay_between_their_start_and_vary_less():
    family, rng = fm.FAMILIES["inviscid_burgers"], np.random.default_rng(7)
    u = family.fields([family.start(rng) for _ in range(4)], np.ones((4, 1)), T, 128)
    assert (u.max((1, 2)) <= u[:, 0].max(1) + 1e-9).all() and (u.min((1, 2)) >= u[:, 0].min(1) - 1e-9).all()
    variation = np.abs(np.diff(u, axis=2, append=u[..., :1])).sum(2)
    assert (np.diff(variation, axis=1) < 1e-9).all()


def test_stiff_steps_are_of_second_order():
    u = np.sin(WAVE * centres(64))[None] + 1.5
    slope = lambda u: solvers.second_difference(u**2 / 2, LENGTH)  # noqa: E731
    true = solvers.chebyshev(u, np.array([0, 0.05]), slope, 2.5 * 4 * 32**2, 1e-4)[0, 1]
    errors = [np.abs(solvers.chebyshev(u, np.array([0, 0.05]), slope, 2.5 * 4 * 32**2, h)[0, 1] - true).max() for h in (0.01, 0.005)]
    assert 3 < errors[0] / errors[1] < 5.5


# starts and samples -------------------------------------------------------------------------------------------------------


def test_starts_close_and_span_what_they_should():
    rng, x = np.random.default_rng(0), centres(128)
    for make, top in ((lambda r: drawn_waves(r, 4, 2), 1), (two_waves, 1), (lambda r: two_waves(r, 0.5), 0.5), (bump, 1)):
        for _ in range(20):
            f = make(rng)
            assert f(x).min() == pytest.approx(0) and f(x).max() == pytest.approx(top)
            np.testing.assert_allclose(f(np.array([0.0])), f(np.array([LENGTH - 1e-9])), atol=1e-6)
    assert density(rng)(x).sum() == pytest.approx(1)


def test_published_numbers():
    rng = np.random.default_rng(0)
    usual = {"heat": [3e-3], "kdv": [0.022], "advection": [0.5], "burgers": [0.01, 1], "Klein_Gordon": [1, 0.1], "fplanck": [1e-3]}
    for name, numbers in usual.items():
        drawn = np.array([fm.FAMILIES[name].draw(rng) for _ in range(60)])
        assert (np.abs(drawn / numbers - 1) < 0.105).all() and (np.ptp(drawn / numbers, axis=0) > 0.15).all()
    assert {fm.FAMILIES["porous_medium"].draw(rng)[0] for _ in range(40)} == {2, 3, 4}
    thresholds = [fm.FAMILIES["diff_bistablereact_1D"].draw(rng)[2] for _ in range(40)]
    assert min(thresholds) < 0.2 and max(thresholds) > 0.8
    short = {"porous_medium": 0.1, "kdv": 1, "fplanck": 0.1, "cahnhilliard_1D": 0.5, "wave": 1, "Klein_Gordon": 1, "Sine_Gordon": 1}
    assert {name: f.final for name, f in fm.FAMILIES.items()} == {name: short.get(name, 2) for name in fm.FAMILIES}
    force, spread = fm.fokker_planck_numbers(1e-3)
    assert force == pytest.approx(2.6526, rel=1e-4) and spread == pytest.approx(2.1973, rel=1e-4)


def test_samples_of_all_families():
    held = fm.families("val", 20, 0)
    assert [s["family"] for s in held] == [*fm.FAMILIES] and held == fm.families("val", 20, 0)
    for s in held:
        assert s["u"].shape == (32, 64, 1) and np.isfinite(s["u"]).all() and s["seen"].shape == (16, 64, 1)
        assert is_valid(s["words"]) and infix(s["words"]).endswith(" = 0") and "<PLACEHOLDER>" in s["guess"]
        assert {*s["words"], *s["guess"]} <= {*task_of("operator-learning").part("sample").pdes20_words()}
        share = np.linalg.norm(s["seen"] - s["u"][:16]) / np.linalg.norm(s["u"][:16])
        assert share == pytest.approx(0.02)
    assert fm.families("val", 3, 1)[0]["words"] != held[0]["words"] != fm.families("train", 3, 0)[0]["words"]


def test_a_family_as_published():
    numbers, u = fm.solved("heat", 2, np.random.default_rng(0))
    assert u.shape == (2, 64, 128) and numbers.shape == (2, 1)
