import pytest
import torch

from formarium.errors import BadInput
from formarium.nn.unet_discriminator import UNetDiscriminator


def test_it_has_the_published_size_and_scores_every_pixel():
    assert sum(p.numel() for p in UNetDiscriminator().parameters()) == 4376897
    network = UNetDiscriminator(dim=8)
    assert network(torch.rand(2, 3, 24, 40)).shape == (2, 1, 24, 40)
    with pytest.raises(BadInput, match="multiples of 8"):
        network(torch.rand(1, 3, 20, 24))


def test_weights_between_first_and_last_have_singular_values_of_at_most_one():
    network = UNetDiscriminator(dim=8).train()
    for conv in (network.down[0], network.up[2], network.extra[1]):
        torch.nn.init.normal_(conv.parametrizations.weight.original, std=3.0)
    with torch.no_grad():
        for _ in range(60):
            network(torch.rand(1, 3, 8, 8))
    network.eval()
    for conv in (*network.down, *network.up, *network.extra):
        assert torch.linalg.svdvals(conv.weight.detach().flatten(1))[0].item() == pytest.approx(1, abs=0.02)


def test_what_it_says_of_a_pixel_depends_on_its_neighbourhood_alone():
    network = UNetDiscriminator(dim=8).eval()
    x = torch.rand(1, 3, 96, 16)
    other = x.clone()
    other[..., :8, :] += 1
    with torch.no_grad():
        change = (network(x) - network(other)).abs().amax((0, 1, 3))
    assert change[:8].min() > 0 and change[72:].max() == 0
