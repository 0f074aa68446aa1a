import pytest
import torch
import torch.nn.functional as F
from torch import nn

from formarium.nn.attention import SelfAttention, merge_heads, split_heads
from formarium.nn.convs import ConvBN
from formarium.nn.drop import Dropout, DropPath, drop_path_rates
from formarium.nn.maps import LayerNorm2d, PatchConv, Pointwise, map_to_tokens, tokens_to_map
from formarium.nn.positions import resize_table


def test_self_attention_is_the_textbooks():
    torch.manual_seed(0)
    layer, x = SelfAttention(12, 3), torch.randn(2, 5, 12)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    heads = []
    for h in range(3):
        at = slice(4 * h, 4 * h + 4)
        heads.append((q[..., at] @ k[..., at].transpose(1, 2) / 2).softmax(-1) @ v[..., at])
    torch.testing.assert_close(layer(x), layer.out(torch.cat(heads, -1)))


def test_heads_split_and_merge():
    x = torch.randn(2, 5, 24)
    parts = split_heads(x, 3, 2)
    assert [p.shape for p in parts] == [(2, 3, 5, 4)] * 2
    assert torch.equal(torch.cat([merge_heads(p) for p in parts], -1), x)


def test_tokens_and_maps_share_memory():
    x = torch.randn(2, 12, 5)
    seen = tokens_to_map(x, (3, 4))
    assert seen.is_contiguous(memory_format=torch.channels_last) and seen.data_ptr() == x.data_ptr()
    assert map_to_tokens(seen).data_ptr() == x.data_ptr() and torch.equal(map_to_tokens(seen), x)


def test_pointwise_and_layer_norm_on_maps():
    x = torch.randn(2, 3, 4, 6)
    layer = Pointwise(6, 5)
    torch.testing.assert_close(layer(x), F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias).permute(0, 2, 3, 1))
    norm = LayerNorm2d(6)
    torch.testing.assert_close(norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), F.layer_norm(x, (6,)))


@pytest.mark.parametrize(("kernel", "groups", "residual"), [(1, 1, False), (1, 1, True), (3, 6, True), (3, 1, False), (5, 6, False)])
def test_convbn_is_a_convolution_and_a_batchnorm(kernel, groups, residual):
    torch.manual_seed(0)
    layer = ConvBN(6, 6, kernel, groups=groups, residual=residual)
    nn.init.normal_(layer.norm.weight)
    x = torch.randn(4, 6, 5, 7).contiguous(memory_format=torch.channels_last)
    plain = nn.Sequential(layer.conv, layer.norm)
    torch.testing.assert_close(layer(x), plain(x) + (x if residual else 0), rtol=1e-4, atol=1e-5)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x) + (x if residual else 0), rtol=1e-4, atol=1e-5)
        layer.norm.running_mean.add_(1)
        torch.testing.assert_close(layer(x), plain(x) + (x if residual else 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_patches_are_convolved_as_by_a_strided_convolution(layout):
    layer = PatchConv(3, 5, 4).double()
    x = torch.randn(2, 3, 14, 9, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()  # with a remainder on both sides
    parameters = (x, *layer.parameters())
    ours, plain = layer(x), F.conv2d(x, layer.weight, layer.bias, 4)
    torch.testing.assert_close(ours, plain)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain)
    back = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(ours, parameters, back), torch.autograd.grad(plain, parameters, back), strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_keeps_the_mean_and_its_share():
    x = torch.full((200, 200), 2.0, requires_grad=True)
    y = Dropout(0.2)(x)
    assert abs(float((y == 0).float().mean()) - 0.2) < 0.01
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 2.5))
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / 2)  # what was dropped gets no gradient
    assert torch.equal(Dropout(0.2).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x) and not Dropout(1.0)(x).any()


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 3))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3]) and out.mean().item() == pytest.approx(1, abs=0.03)
    assert (out == out[:, :1]).all() and torch.equal(drop.eval()(out), out)
    assert drop_path_rates(0.3, (1, 2, 1)) == [[0.0], [pytest.approx(0.1), pytest.approx(0.2)], [pytest.approx(0.3)]]


def test_tables_resize_as_images_do():
    table = torch.randn(1, 12, 5)
    assert resize_table(table, (3, 4), (3, 4)) is table
    grown = resize_table(table, (3, 4), (6, 9))
    expected = F.interpolate(table.reshape(1, 3, 4, 5).permute(0, 3, 1, 2), size=(6, 9), mode="bilinear")
    torch.testing.assert_close(grown, expected.flatten(2).transpose(1, 2))
