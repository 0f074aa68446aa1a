import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from formarium.nn.heatmaps import blur, dark, flip_back, gaussian_targets, heatmap_loss, peaks, swapped


def test_targets_are_gaussians_at_sub_pixel_places():
    points = torch.tensor([[[10.3, 20.8], [0.0, 0.0]]])
    maps, weights = gaussian_targets(points, torch.ones(1, 2), (64, 48), sigma=2.0)
    assert maps.shape == (1, 2, 64, 48) and weights.tolist() == [[1, 1]]
    assert maps[0, 0, 21, 10].item() == pytest.approx(np.exp(-(0.3**2 + 0.2**2) / 8), rel=1e-5)
    assert maps[0, 0, 21, 16] > 0 and maps[0, 0, 21, 17] == 0  # cut at three sigma from the nearest pixel
    assert maps[0, 1, 0, 0] == 1


def test_joints_far_outside_or_unmarked_have_no_weight():
    points = torch.tensor([[[-30.0, 5.0], [20.0, 5.0], [53.0, 5.0], [60.0, 5.0]]])
    maps, weights = gaussian_targets(points, torch.tensor([[1.0, 0, 1, 1]]), (32, 48))
    assert weights.tolist() == [[0, 0, 1, 0]]
    assert maps[0, [0, 1, 3]].abs().sum() == 0 and maps[0, 2].sum() > 0


def test_the_loss_ignores_joints_without_weight():
    maps = torch.rand(2, 3, 8, 8)
    target = maps.clone()
    target[:, 1] += 5
    weights = torch.tensor([[1.0, 0, 1]] * 2)
    assert heatmap_loss(maps, target, weights) == 0
    assert heatmap_loss(maps, target, torch.ones(2, 3)).item() == pytest.approx(25 / 3, rel=1e-5)


def test_blur_is_the_separable_gaussian_with_a_mirrored_border():
    maps = torch.rand(1, 1, 20, 16)
    wanted = maps[0, 0].double().numpy()
    for axis in (0, 1):
        wanted = gaussian_filter1d(wanted, 2.0, axis=axis, mode="mirror", radius=5)
    np.testing.assert_allclose(blur(maps, 11)[0, 0].numpy(), wanted, atol=1e-6)


def test_decoding_finds_a_gaussian_between_pixels():
    points = torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([24.0, 40.0]) + 10
    maps, _ = gaussian_targets(points, torch.ones(4, 5), (64, 48))
    places, values = dark(maps)
    assert (places - points).abs().max() < 0.05 and values.min() > 0.9
    assert (peaks(maps)[0] - points).abs().max() > 0.3  # which the peak alone doesn't


def test_a_map_without_a_peak_is_decoded_to_something_finite():
    places, values = dark(torch.zeros(1, 2, 8, 6))
    assert torch.isfinite(places).all() and (values == 0).all()


def test_flipping_twice_gives_the_maps_back():
    maps = torch.rand(2, 5, 4, 6)
    pairs = ((1, 2), (3, 4))
    assert torch.equal(flip_back(flip_back(maps, pairs), pairs), maps)
    assert torch.equal(flip_back(maps, pairs)[:, 1, :, 0], maps[:, 2, :, -1])
    assert swapped(pairs, 5) == [0, 2, 1, 4, 3]
