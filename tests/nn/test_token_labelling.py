import torch
import torch.nn.functional as F

from formarium.nn.token_labelling import NO_BOX, blend_truth, mix_tokens, random_box, token_label_loss


def test_the_box_comes_from_the_reversed_batch_and_goes_back():
    x = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 8, 12, 2).clone()
    mixed = mix_tokens(x, (1, 2, 3, 4), scale=2)
    assert mixed[0, 2:6, 4:8].unique().tolist() == [2.0] and mixed[0, :2].unique().tolist() == [0.0]
    assert (mixed[0] == 2).sum() == 4 * 4 * 2 and (mixed[1] == 1).all()
    assert torch.equal(mix_tokens(mixed, (1, 2, 3, 4), scale=2), x)
    assert mix_tokens(x, NO_BOX) is x


def test_boxes_stay_inside_and_cover_about_a_third():
    g = torch.Generator().manual_seed(0)
    boxes = [random_box((7, 9), g) for _ in range(2000)]
    assert all(0 <= t <= b <= 7 and 0 <= a <= r <= 9 for t, a, b, r in boxes)
    share = sum((b - t) * (r - a) for t, a, b, r in boxes) / 2000 / 63
    assert 0.15 < share < 0.4  # half before rounding down and cutting at the border
    assert len({*boxes}) > 200


def test_the_loss_term_by_term():
    torch.manual_seed(0)
    logits, tokens = torch.randn(4, 5), torch.randn(4, 6, 5)
    target, labels = torch.rand(4, 5).softmax(1), torch.rand(4, 5, 6).softmax(1)
    total, cls, dense = token_label_loss(logits, tokens, target, labels, (0, 0, 1, 2), token_weight=0.3, class_weight=2.0)
    share = 2 / 6
    mixed = (1 - share) * target + share * target.flip(0)
    torch.testing.assert_close(cls, -(mixed * logits.log_softmax(1)).sum(1).mean())
    by_hand = torch.stack([-(labels[b, :, t] * F.log_softmax(tokens[b, t], 0)).sum() for b in range(4) for t in range(6)]).mean()
    torch.testing.assert_close(dense, by_hand)
    torch.testing.assert_close(total, 2 * cls + 0.3 * dense)
    _, _, same = token_label_loss(logits, tokens, target)
    torch.testing.assert_close(same, token_label_loss(logits, tokens, target, target[..., None].expand(4, 5, 6))[2])


def test_the_truth_counts_more_where_the_annotator_agrees():
    truth = F.one_hot(torch.tensor([0, 1]), 3).float()
    said = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]])
    torch.testing.assert_close(blend_truth(said, truth)[0], 0.5 * said[0] + 0.5 * truth[0])
    torch.testing.assert_close(blend_truth(said, truth)[1], 0.9 * said[1] + 0.1 * truth[1])
