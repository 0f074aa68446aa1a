from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from formarium import create
from formarium.engine.records import replay
from formarium.models.image.stvit import STViT, SuperTokenAttention, neighbours, scatter_neighbours

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "stvit").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


def attention(size=(4, 2), iterations=1, dim=8, heads=2, **options) -> SuperTokenAttention:
    torch.manual_seed(0)
    c = STViT.Config(dims=(dim,), depths=(1,), heads=(heads,), super_tokens=(size,), iterations=(iterations,), **options)
    return SuperTokenAttention(c, 0).eval()


def dense_association(layer: SuperTokenAttention, x: torch.Tensor) -> torch.Tensor:
    """Q as the matrix [pixels, super tokens], pixel by pixel from its definition (one iteration)."""
    height, width, (h, w) = x.shape[1], x.shape[2], layer.size
    rows, columns = -(-height // h), -(-width // w)
    padded = F.pad(x[0], (0, 0, 0, columns * w - width, 0, rows * h - height))
    tokens = padded.unflatten(0, (rows, h)).unflatten(2, (columns, w)).mean((1, 3))
    q = torch.zeros(rows * h, columns * w, rows, columns)
    for r in range(rows * h):
        for c in range(columns * w):
            around = [(r // h + i, c // w + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            inside = [0 <= i < rows and 0 <= j < columns for i, j in around]
            affinity = [
                padded[r, c] @ tokens[at] * x.shape[-1] ** -0.5 if ok else x.new_zeros(()) for at, ok in zip(around, inside, strict=True)
            ]
            for at, ok, weight in zip(around, inside, torch.stack(affinity).softmax(0), strict=True):
                if ok:
                    q[r, c][at] = weight
    return q.flatten(2).flatten(0, 1), padded


def test_claim_it_is_q_attention_s_with_the_explicit_matrix():
    layer, x = attention(), torch.randn(1, 11, 7, 8)
    q, padded = dense_association(layer, x)
    s = q.T @ padded.flatten(0, 1) / (q.sum(0)[:, None] + 1e-12)
    attended = layer.attend(s.view(1, 3, 4, 8)).flatten(1, 2)
    expected = (q @ attended).view(12, 8, 8)[:11, :7]
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-6, rtol=1e-4)


def test_claim_the_nine_weights_of_a_pixel_sum_to_one():
    layer = attention((3, 5), iterations=3)
    association = layer.associate(layer.cells(torch.randn(2, 10, 21, 8)))
    assert association.shape == (2, 4, 5, 15, 9)
    torch.testing.assert_close(association.sum(-1), torch.ones(2, 4, 5, 15))


def test_claim_the_cost_of_attention_falls_with_the_square_of_the_cell():
    def products(size):
        layer = attention(size, dim=16, heads=1)
        seen = []
        original = F.scaled_dot_product_attention

        def spy(q, k, v, **kw):
            seen.append(q.shape[2] * k.shape[2])
            return original(q, k, v, **kw)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                F, "scaled_dot_product_attention", lambda q, k, v, **kw: seen.append(q.shape[2] * k.shape[2]) or original(q, k, v)
            )
            with torch.no_grad():
                layer(torch.randn(1, 32, 32, 16))
        return seen[0]

    assert products((1, 1)) == 4**4 * products((4, 4)) == 32**4


def test_cells_of_one_pixel_are_plain_attention():
    layer, x = attention((1, 1)), torch.randn(2, 5, 6, 8)
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    order = torch.arange(24).view(2, 3, 4).transpose(0, 1).flatten()  # their projection goes head by head
    with torch.no_grad():
        plain.in_proj_weight.copy_(layer.qkv.weight.flatten(1)[order])
        plain.in_proj_bias.copy_(layer.qkv.bias[order])
        plain.out_proj.weight.copy_(layer.out.weight.flatten(1))
        plain.out_proj.bias.copy_(layer.out.bias)
    t = x.flatten(1, 2)
    torch.testing.assert_close(layer(x).flatten(1, 2), plain(t, t, t)[0], atol=1e-6, rtol=1e-4)


def test_cells_of_equal_pixels_far_from_the_others_are_the_super_tokens():
    layer = attention((4, 4), dim=16)
    centres = 60 * torch.eye(16)[:9].view(1, 3, 3, 16)
    x = centres.repeat_interleave(4, 1).repeat_interleave(4, 2)
    pixels = layer.cells(x)
    torch.testing.assert_close(layer.sample(pixels, layer.associate(pixels)), centres)


def test_scatter_is_the_adjoint_of_the_neighbourhood():
    x, y = torch.randn(2, 4, 5, 3, dtype=torch.float64), torch.randn(2, 4, 5, 9, 3, dtype=torch.float64)
    torch.testing.assert_close((neighbours(x) * y).sum(), (x * scatter_neighbours(y)).sum())
    assert neighbours(x)[0, 0, 0, :4].abs().sum() == 0  # beyond the border are zeros
    torch.testing.assert_close(neighbours(x)[:, 1, 1].view(2, 3, 3, 3), x[:, :3, :3])


def test_a_pixel_at_the_border_keeps_only_part_of_its_weight():
    layer = attention((4, 4))
    association = layer.associate(layer.cells(torch.zeros(1, 12, 12, 8)))
    kept = neighbours(torch.ones(1, 3, 3, 1))[..., 0] @ association[0, 0, 0, 0]
    torch.testing.assert_close(kept[0].flatten(), torch.tensor([4, 6, 4, 6, 9, 6, 4, 6, 4]) / 9)


def test_no_gradient_through_the_weights_unless_asked():
    x = torch.randn(1, 8, 8, 8, requires_grad=True)
    assert not attention().associate(attention().cells(x)).requires_grad
    layer = attention(association_gradient=True)
    assert layer.associate(layer.cells(x)).requires_grad
    torch.testing.assert_close(layer(x), attention()(x))


def test_a_second_iteration_changes_the_weights():
    x = torch.randn(1, 8, 8, 8)
    assert (attention(iterations=2)(x) - attention()(x)).abs().max() > 1e-3


def test_layer_scale_in_the_last_stages_of_base_and_large_only():
    with torch.device("meta"):
        for name, expected in (("stvit_small_224", [0, 0, 0, 0]), ("stvit_base_224", [0, 0, 1, 1]), ("stvit_large_224", [0, 0, 1, 1])):
            assert [int(s.blocks[0].scale1 is not None) for s in create(name).stages] == expected


def test_dense_gives_a_pyramid_of_any_size():
    model = create("stvit_small_dense", depths=(1, 1, 1, 1)).eval()
    with torch.no_grad():
        maps = model(torch.rand(1, 3, 100, 68))
    assert [tuple(m.shape) for m in maps] == [(1, 64, 25, 17), (1, 128, 13, 9), (1, 320, 7, 5), (1, 512, 4, 3)]


def test_it_learns():
    torch.manual_seed(0)
    model = create("stvit_micro").train()
    batch = model.example_batch(16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        loss = model.loss(batch).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert model.eval().predict(batch).probabilities.shape == (16, 10)
