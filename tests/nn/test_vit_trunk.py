import torch
import torch.nn.functional as F

from formarium.nn.vit_trunk import BEiTAttention, Bottleneck, GridAttention, TrunkBlock


def windowed(x, grid, size, attend):
    """Window by window."""
    h, w = grid
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, -w % size, 0, -h % size))
    out = torch.zeros(*x.shape[:3], x.shape[3])
    for i in range(0, x.shape[1], size):
        for j in range(0, x.shape[2], size):
            out[:, i : i + size, j : j + size] = attend(x[:, i : i + size, j : j + size].flatten(1, 2)).unflatten(1, (size, size))
    return out[:, :h, :w].flatten(1, 2)


def test_windows_pad_queries_keys_and_values_with_zeros_that_are_not_masked():
    layer, grid = GridAttention(12, 3, window=3), (4, 5)
    x = torch.randn(2, 20, 12)
    padded = F.pad(layer.qkv(x).unflatten(1, grid), (0, 0, 0, 1, 0, 2))
    rows = []
    for i in (0, 3):
        row = []
        for j in (0, 3):
            q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in padded[:, i : i + 3, j : j + 3].flatten(1, 2).chunk(3, -1))
            y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
            row.append(y.transpose(1, 2).flatten(2).unflatten(1, (3, 3)))
        rows.append(torch.cat(row, 2))
    expected = layer.out(torch.cat(rows, 1)[:, :4, :5].flatten(1, 2))
    torch.testing.assert_close(layer(x, grid), expected)


def test_beits_windows_pad_the_tokens_and_its_keys_have_no_bias():
    layer, grid = BEiTAttention(12, 3, window=2), (3, 4)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    alone = BEiTAttention(12, 3, window=2)
    alone.load_state_dict(layer.state_dict())
    x = torch.randn(2, 12, 12)
    torch.testing.assert_close(layer(x, grid), windowed(x, grid, 2, lambda part: alone(part, (2, 2))))
    q, k, v = F.linear(x[:, :4], layer.qkv.weight, torch.cat([layer.q_bias, torch.zeros(12), layer.v_bias])).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / 2 + layer.bias_table[layer.index].permute(2, 0, 1)
    torch.testing.assert_close(layer(x[:, :4], (2, 2)), layer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


def test_without_a_window_every_token_sees_every_other():
    layer, x = GridAttention(12, 3), torch.randn(1, 6, 12)
    other = x.clone()
    other[:, 5] += 1
    assert ((layer(x, (2, 3)) - layer(other, (2, 3))).abs().sum(-1) > 0).all()
    near = GridAttention(12, 3, window=1)
    assert ((near(x, (2, 3)) - near(other, (2, 3))).abs().sum(-1) > 0).nonzero().tolist() == [[0, 5]]


def test_a_bottleneck_starts_as_the_identity_and_sees_its_neighbours():
    layer, x = Bottleneck(8), torch.randn(1, 12, 8)
    torch.testing.assert_close(layer(x, (3, 4)), x)
    torch.nn.init.ones_(layer.norms[2].weight)
    other = x.clone()
    other[:, 0, 0] += 3
    moved = (layer(x, (3, 4)) - layer(other, (3, 4))).abs().sum(-1)[0].nonzero().flatten().tolist()
    assert moved == [0, 1, 4, 5]  # 3x3


def test_a_trunk_block_scales_its_branches_per_channel():
    block, x = TrunkBlock(8, GridAttention(8, 2), 2, 0.0, scale=0.0), torch.randn(2, 6, 8)
    assert torch.equal(block(x, (2, 3)), x)
    plain = TrunkBlock(8, GridAttention(8, 2), 2, 0.0)
    assert plain.scale1 is None and not torch.equal(plain(x, (2, 3)), x)
    torch.nn.init.ones_(block.scale1)
    torch.nn.init.ones_(block.scale2)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if "scale" not in k})
    torch.testing.assert_close(plain(x, (2, 3)), block(x, (2, 3)))
