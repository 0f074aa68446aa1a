import pytest
import torch

from formarium.features import Feature
from formarium.nn.convnext import ConvNeXt, ConvNeXtBlock, interleave, upsampled


@pytest.mark.parametrize(
    ("dims", "depths", "parameters"), [((96, 192, 384, 768), (3, 3, 9, 3), 28589128), ((192, 384, 768, 1536), (3, 3, 27, 3), 197767336)]
)
def test_the_published_sizes(dims, depths, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in ConvNeXt(dims, depths, 1000).parameters()) == parameters


def test_two_views_go_through_convnext_together_as_they_would_apart():
    torch.manual_seed(0)
    net = ConvNeXt((8, 16), (1, 1), 5, layer_scale=1.0).eval()
    a, b = torch.randn(2, 3, 3, 32, 32)
    with torch.no_grad():
        together = net(interleave(a, b), 2).view(3, 2, 5)
        torch.testing.assert_close(together, torch.stack([net(a), net(b)], 1))


def test_a_tap_sees_the_views_of_a_sample_as_its_tokens():
    net, seen = ConvNeXt((8, 16), (1, 1), 5), []

    def watch(feature: Feature) -> None:
        seen.append((tuple(feature.tokens.shape), feature.grid))

    net.stages[1].blocks[0].tap.watch = watch
    a, b = torch.randn(2, 3, 3, 32, 32)
    net(interleave(a, b), 2)
    net(a)
    assert seen == [((3, 32, 16), (2, 4, 4)), ((3, 16, 16), (4, 4))]


def test_a_block_is_depthwise_7x7_then_a_network_a_pixel():
    block = ConvNeXtBlock(4, layer_scale=1.0)
    x = torch.randn(1, 15, 15, 4)
    other = x.clone()
    other[:, 7, 7] += 1
    moved = (block(x) - block(other)).abs().sum(-1)[0].nonzero()
    assert moved.min() == 4 and moved.max() == 10 and len(moved) == 49
    assert torch.equal(ConvNeXtBlock(4, layer_scale=0.0)(x), x)


def test_upsampling_is_bilinear():
    x = torch.rand(1, 3, 8, 8)
    expected = torch.nn.functional.interpolate(x, size=(16, 16), mode="bilinear")
    torch.testing.assert_close(upsampled(x, (16, 16)), expected)
