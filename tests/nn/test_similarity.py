import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import rankdata, spearmanr
from sklearn.cross_decomposition import CCA

from formarium.nn.components import Components, centre, clusters_on_line, component_clusters
from formarium.nn.similarity import cka, cka_matrix, distances, ranks, rsa, rsa_matrix, spearman, svcca, svcca_matrix


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(x: torch.Tensor) -> torch.Tensor:
    """The same geometry: turned, shifted, scaled."""
    turn, _ = torch.linalg.qr(features(x.shape[1], x.shape[1], seed=9))
    return 3.7 * x @ turn + 5


@pytest.mark.parametrize("measure", [rsa, cka, lambda a, b: cka(a, b, debiased=True), svcca])
def test_equal_geometry_is_1_whatever_the_axes(measure):
    x = features(60, 12)
    assert measure(x, x).item() == pytest.approx(1, abs=1e-9)
    assert measure(x, moved(x)).item() == pytest.approx(1, abs=1e-6)
    assert measure(moved(x), x).item() == pytest.approx(1, abs=1e-6)


def test_unrelated_features_are_unlike():
    x, y = features(200, 10), features(200, 10, seed=1)
    assert abs(rsa(x, y)) < 0.1 and abs(cka(x, y, debiased=True)) < 0.05 and svcca(x, y) < 0.3
    wide = features(20, 500), features(20, 500, seed=1)  # few samples in many channels: only the debiased form sees through it
    assert cka(*wide) > 0.8 and abs(cka(*wide, debiased=True)) < 0.2


def test_rsa_is_scipys_spearman_of_scipys_distances():
    x, y = features(40, 7), features(40, 5, seed=1)
    expected = spearmanr(pdist(x.double().numpy()), pdist(y.double().numpy())).statistic
    assert rsa(x, y).item() == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(distances(x, "cosine").numpy(), pdist(x.double().numpy(), "cosine"), atol=1e-9)
    tied = torch.tensor([3.0, 1.0, 3.0, 2.0, 1.0, 1.0])
    np.testing.assert_array_equal(ranks(tied).numpy(), rankdata(tied.numpy()))
    assert spearman(tied, tied.flip(0)).item() == pytest.approx(spearmanr(tied, tied.flip(0)).statistic)


def test_svcca_is_sklearns_cca_where_nothing_is_cut_off():
    x, y = features(80, 3), features(80, 3, seed=1) + features(80, 3)
    a, b = CCA(3, max_iter=2000, tol=1e-10).fit_transform(x.double().numpy(), y.double().numpy())
    expected = np.mean([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(3)])
    assert svcca(x, y, variance=1.0).item() == pytest.approx(expected, abs=1e-4)


def test_matrices_hold_every_pair():
    xs, ys = [features(30, 4), features(30, 6, seed=1)], [features(30, 5, seed=2), features(30, 4), features(30, 3, seed=3)]
    for matrix, one in [(rsa_matrix, rsa), (cka_matrix, cka), (svcca_matrix, svcca)]:
        expected = torch.stack([torch.stack([one(x, y) for y in ys]) for x in xs])
        torch.testing.assert_close(matrix(xs, ys), expected)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_components_take_features_apart_and_put_them_together(shape):
    x = features(*shape) + 2
    c = Components.of(x)
    centred = centre(x.double())
    torch.testing.assert_close(c.without_leading(0), centred)
    torch.testing.assert_close(sum(c.only(k) for k in range(len(c.s))), centred)
    torch.testing.assert_close(c.without_leading(2), centred - c.only(0) - c.only(1))
    assert c.without_leading(len(c.s)).abs().max() == 0
    torch.testing.assert_close(c.project(2), centred @ c.v[:, :2])
    assert c.explained.sum().item() == pytest.approx(1) and c.count(1.0) <= min(shape)
    assert Components.of(moved(x)).explained.sub(c.explained).abs().max() < 1e-6


def test_components_count_directions():
    x = torch.zeros(40, 10)
    x[:, 3], x[:, 7] = features(40), 2 * features(40, seed=1)
    c = Components.of(x)
    assert c.count(0.5) == 1 and c.count(0.99) == 2 and 1 < c.participation <= 2
    still = Components.of(torch.ones(5, 3))
    assert still.count(0.95) == 3 and still.participation == 0 and still.explained.sum() == 0


def test_clusters_on_a_line_are_the_best_ones():
    values = torch.tensor([5.0, 0.1, 9.9, 5.2, 0.0, 10.1, 5.1])
    assert clusters_on_line(values, 3).tolist() == [1, 0, 2, 1, 0, 2, 1]
    assert clusters_on_line(torch.ones(4), 3).tolist() == [0, 0, 0, 0]
    from sklearn.cluster import KMeans

    x = features(60)
    ours = clusters_on_line(x, 4)
    cost = sum(((x[ours == c] - x[ours == c].mean()) ** 2).sum().item() for c in range(4))
    assert cost <= KMeans(4, n_init=20, random_state=0).fit(x[:, None].numpy()).inertia_ + 1e-4


def test_clusters_along_components_heed_the_smaller_axis():
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1], [50, 30])
    plane = np.stack([np.repeat([0, 1], 40) * 100.0, group * 1.0], 1)  # the second axis is a hundred times smaller
    plane = np.vstack([plane + rng.normal(size=plane.shape) * [2, 0.02], [[0, 1]]])
    found = component_clusters(torch.from_numpy(plane), 2).numpy()
    cells = [found[:40], found[40:50], found[50:80], found[80:]]  # of 40, 10, 30 samples and one
    assert [{*c.tolist()} for c in cells] == [{0}, {-1}, {1}, {-1}]
