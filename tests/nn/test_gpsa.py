import pytest
import torch

from formarium.nn.gpsa import GatedPositionalAttention


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
def test_it_is_the_gated_sum_of_two_attentions(grid):
    torch.manual_seed(0)
    layer = GatedPositionalAttention(12, 4)
    layer.gate.copy_(torch.tensor([-2.0, -0.5, 0.5, 2.0]))
    n = grid[0] * grid[1]
    x = torch.randn(2, n, 12)
    q, k = layer.qk(x).view(2, n, 2, 4, 3).permute(2, 0, 3, 1, 4)
    v = layer.v(x).view(2, n, 4, 3).transpose(1, 2)
    where = torch.tensor([[i % grid[1], i // grid[1]] for i in range(n)], dtype=torch.float32)
    d = where[None] - where[:, None]
    position = layer.position(torch.cat([d, d.square().sum(-1, keepdim=True)], -1)).permute(2, 0, 1).softmax(-1)
    s = layer.gate.sigmoid()[:, None, None]
    attention = (1 - s) * (q @ k.transpose(2, 3) / 3**0.5).softmax(-1) + s * position
    wanted = layer.out((attention @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, grid), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_heads_first_look_at_one_neighbour_each():
    layer = GatedPositionalAttention(18, 9, locality=4.0)
    layer.look_at_neighbours()
    near = layer.position(layer.offsets((5, 5), torch.zeros(1))).permute(2, 0, 1).softmax(-1)
    middle = 2 * 5 + 2
    seen = [divmod(int(near[h, middle].argmax()), 5) for h in range(9)]
    assert seen == [(2 + row, 2 + column) for column in (-1, 0, 1) for row in (-1, 0, 1)]
    assert torch.equal(layer.v.weight, torch.eye(18))
