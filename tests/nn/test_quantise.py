from itertools import pairwise

import torch

from formarium.nn.quantise import Codebook, ResidualQuantiser


def filled(levels=3, **options):
    torch.manual_seed(0)
    q = ResidualQuantiser(levels, 16, 4, **options)
    for i, level in enumerate(q.levels):
        level.codebook.normal_().mul_(0.5**i)
        level.count.fill_(1)
    return q


def test_each_level_codes_what_is_left():
    q, x = filled().eval(), torch.randn(2, 7, 4)
    codes = q.encode(x)
    residual = x
    for i, level in enumerate(q.levels):
        nearest = torch.cdist(residual, level.codebook[None]).argmin(-1)
        assert torch.equal(codes[..., i], nearest)
        residual = residual - level.codebook[nearest]
    torch.testing.assert_close(q.lookup(codes), x - residual)
    out = q(x)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.vectors, q.lookup(codes))


def test_the_error_falls_with_each_level():
    torch.manual_seed(0)
    q, x = ResidualQuantiser(4, 32, 3).train(), torch.randn(8, 50, 3)
    for _ in range(20):
        q(x)
    q.eval()
    errors = [(q.lookup(q.encode(x)[..., : i + 1]) - x).square().mean().item() for i in range(4)]
    assert all(b < 0.7 * a for a, b in pairwise(errors)), errors


def test_left_out_levels_are_minus_one_and_add_nothing():
    q, x = filled(dropout=1.0).train(), torch.randn(2, 5, 4)
    kinds = {int((q(x).codes[0, 0] >= 0).sum()) for _ in range(40)}
    assert kinds == {1, 2, 3}
    q.eval()
    one = q(x, levels=1)
    assert (one.codes[..., 1:] == -1).all()
    torch.testing.assert_close(q.lookup(one.codes), one.vectors)
    torch.testing.assert_close(q.lookup(one.codes[..., :1]), one.vectors)


def test_gradients_pass_and_codebooks_are_no_parameters():
    q, x = filled(levels=1).eval(), torch.randn(1, 3, 4, requires_grad=True)
    q(x).vectors.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    assert not [*q.parameters()] and len(q.state_dict()) == 3
    shared = ResidualQuantiser(3, 16, 4, shared=True)
    assert len({id(level) for level in shared.levels}) == 1


def test_the_first_batch_fills_a_codebook_which_then_follows_the_data():
    torch.manual_seed(0)
    book = Codebook(4, 2, decay=0.5).train()
    x = torch.tensor([[0.0, 0], [0, 1], [10, 0], [10, 1]]).repeat(25, 1)
    for _ in range(30):
        book(x)
    found, want = {tuple(round(v, 1) for v in row) for row in book.codebook.tolist()}, {tuple(row) for row in x.tolist()}
    assert found <= {(0.0, 0.0), (0.0, 1.0), (10.0, 0.0), (10.0, 1.0), (0.0, 0.5), (10.0, 0.5)} and len(want) == 4
    far = x + 100
    for _ in range(12):
        book(far)
    assert book.codebook.min() > 50  # codes nothing chooses are put where data are


def test_few_vectors_fill_many_codes_and_eval_moves_nothing():
    book = Codebook(16, 2).train()
    book(torch.randn(3, 2))
    assert len(book.codebook.unique(dim=0)) == 16
    before = book.codebook.clone()
    book.eval()(torch.randn(50, 2))
    assert torch.equal(book.codebook, before)


def test_sampling_prefers_near_codes():
    torch.manual_seed(0)
    book = Codebook(2, 1, temperature=0.5)
    book.codebook.copy_(torch.tensor([[0.0], [1.0]]))
    x = torch.full((4000, 1), 0.4)
    share = (book.nearest(x, 0.5) == 0).float().mean().item()
    logits = -torch.tensor([0.16, 0.36]) / 0.5
    assert abs(share - logits.softmax(0)[0].item()) < 0.03 and (book.nearest(x) == 0).all()
