import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from formarium.nn.reparameterised import RepConv, widen


def trained(layer: RepConv) -> RepConv:
    for m in layer.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 1.5)
    return layer.eval()


@pytest.mark.parametrize(
    "args", [(24, 24, 1, (1, 2, 4)), (24, 48, 1, (1, 2, 4)), (48, 48, 3, (2, 6)), (24, 24, 3, (3,)), (24, 8, 5, (4, 8))]
)
def test_one_convolution_computes_the_sum_of_branches(args):
    torch.manual_seed(0)
    layer = trained(RepConv(*args)).double()
    x = torch.randn(2, args[0], 6, 5, dtype=torch.float64)
    branches = sum(norm(conv(x)) for conv, norm in zip(layer.convs, layer.norms, strict=True))
    if layer.identity is not None:
        branches = branches + layer.identity(x)
    fused = layer.fuse()
    torch.testing.assert_close(layer(x), branches, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fused(x), branches, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), branches, rtol=1e-10, atol=1e-10)
    assert (layer.identity is None) == (args[0] != args[1])


def test_a_grouped_kernel_is_a_block_diagonal_matrix():
    conv = nn.Conv2d(8, 12, 1, groups=4, bias=False)
    wide = widen(conv.weight, 4, 1)[..., 0, 0]
    blocks = torch.block_diag(*conv.weight[..., 0, 0].chunk(4))
    assert torch.equal(wide, blocks)
    x = torch.randn(1, 8, 3, 3)
    torch.testing.assert_close(conv(x), F.conv2d(x, widen(conv.weight, 4, 2), groups=2))


def test_the_kept_kernel_is_never_stale():
    torch.manual_seed(0)
    layer, x = trained(RepConv(24, 24, 1, (1, 2, 4))), torch.randn(4, 24, 5, 5)
    with torch.no_grad():
        layer(x)
        layer.convs[0].weight.mul_(2)
        now = layer(x)
    torch.testing.assert_close(now, layer(x))  # with gradients: branch by branch
    layer.train()(x).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    layer.eval()
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), copy.deepcopy(layer).fuse()(x), rtol=1e-4, atol=1e-4)


def test_training_normalises_by_the_batch():
    torch.manual_seed(0)
    layer, x = RepConv(24, 24, 1, (1, 2, 4)), torch.randn(8, 24, 6, 6) * 3 + 1
    for norm in layer.norms:
        nn.init.normal_(norm.weight)
    y = layer.train()(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(24), atol=1e-5, rtol=0)
    seen = layer.norms[0].running_mean
    torch.testing.assert_close(seen, 0.1 * layer.convs[0](x).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
