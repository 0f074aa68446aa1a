import torch

from formarium.nn.light import BiGate, LightStem, MergePatches


def test_merging_takes_neighbours_column_by_column_and_their_maximum():
    layer = MergePatches(3, 5).eval()
    x = torch.randn(1, 12, 3)
    m = x.view(1, 3, 4, 3)
    padded = torch.cat([m, torch.zeros(1, 1, 4, 3)], 1)  # an odd side gets a row of zeros
    cells = torch.cat([padded[:, i::2, j::2] for i, j in [(0, 0), (1, 0), (0, 1), (1, 1)]], -1).flatten(1, 2)
    most = torch.stack([padded[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0).flatten(1, 2)
    out, grid = layer(x, (3, 4))
    assert grid == (2, 2)
    torch.testing.assert_close(out, layer.reduce(layer.norm(cells)) + layer.shortcut(most))


def test_gates_multiply():
    gate = BiGate(8)
    x = torch.randn(2, 5, 8)
    z = gate.norm(x)
    mean = torch.nn.functional.gelu(gate.mean(z.mean(1, keepdim=True)))
    both = torch.cat([torch.nn.functional.gelu(gate.own(z)), mean.expand(-1, 5, -1)], -1)
    torch.testing.assert_close(gate(x), x * torch.sigmoid(gate.channel(mean)) * torch.sigmoid(gate.token(both)))


def test_the_stem_has_stride_eight():
    fine, tokens, grid = LightStem(3, 16).eval()(torch.rand(1, 3, 50, 64))
    assert grid == (7, 8) and tokens.shape == (1, 56, 16) and fine.shape == (1, 8, 13, 16)
