import torch
import torch.nn.functional as F
from torch import nn

from formarium.nn.attacks import fast_adversary, fgsm_step, gradient_of, pgd, quarter_turns, uniform_noise

EPS = 0.05


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()


def test_the_gradient_is_zero_where_clipping_saturates():
    x = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    noise = torch.tensor([-0.1, 0.1, 0.1]).view(1, 1, 1, 3)
    loss, gradient = gradient_of(lambda y: (3 * y).sum(), x, noise)
    assert gradient.flatten().tolist() == [0.0, 3.0, 0.0] and abs(loss.item() - 3 * (0 + 0.6 + 1)) < 1e-6
    assert fgsm_step(noise, gradient, 0.2, 0.15).flatten().tolist() == [
        torch.tensor(-0.1).item(),
        torch.tensor(0.15).item(),
        torch.tensor(0.1).item(),
    ]


def test_an_attack_stays_in_the_ball_and_the_range_and_leaves_weights_alone():
    net, x, label = classifier(), torch.rand(6, 3, 8, 8), torch.arange(6) % 4

    def loss_of(y):
        return F.cross_entropy(net(y), label, reduction="none")

    for image in (fast_adversary(loss_of, x, EPS, 1.25 * EPS), pgd(loss_of, x, EPS, EPS / 4, 5, restarts=2)):
        assert (image - x).abs().max() <= EPS + 1e-6 and image.min() >= 0 and image.max() <= 1 and not image.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_pgd_is_at_least_as_strong_as_one_step_and_never_helps():
    net, x, label = classifier(), torch.rand(16, 3, 8, 8), torch.arange(16) % 4

    def loss_of(y):
        return F.cross_entropy(net(y), label, reduction="none")

    torch.manual_seed(0)
    clean, one, many = (loss_of(y).detach() for y in (x, fast_adversary(loss_of, x, EPS, 1.25 * EPS), pgd(loss_of, x, EPS, EPS / 4, 10)))
    assert (many >= clean - 1e-6).all() and many.mean() >= one.mean() > clean.mean()
    assert torch.equal(pgd(lambda y: -y.new_ones(len(y)) * 0 + 0 * y.sum((1, 2, 3)), x, 0.0, 0.1, 2), x)


def test_turns_are_by_right_angles():
    x = torch.rand(5, 2, 4, 4)
    turns = torch.tensor([0, 1, 2, 3, 5])
    out = quarter_turns(x, turns)
    for i, k in enumerate(turns.tolist()):
        assert torch.equal(out[i], torch.rot90(x[i], k, (1, 2)))
    noise = uniform_noise(torch.zeros(4000), 0.1)
    assert noise.abs().max() <= 0.1 and abs(noise.mean()) < 0.01 and noise.abs().mean() > 0.04
