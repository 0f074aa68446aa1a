import pytest
import torch
import torch.nn.functional as F

from formarium.nn import time_convs
from formarium.nn.time_convs import depthwise_over_time


@pytest.mark.parametrize("kernel", [1, 5, 8, 17])
def test_it_is_conv1d_with_as_many_frames(kernel):
    x, w, b = torch.randn(2, 20, 6), torch.randn(6, 1, kernel), torch.randn(6)
    padded = F.pad(x.transpose(1, 2), ((kernel - 1) // 2, kernel // 2))
    torch.testing.assert_close(depthwise_over_time(x, w, b), F.conv1d(padded, w, b, groups=6).transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [1, 4, 5])
def test_its_own_gradients_are_the_functions(monkeypatch, kernel):
    monkeypatch.setattr(time_convs, "LONG", 1)
    x, w, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 7, 3), (3, 1, kernel), (3,)))
    assert torch.autograd.gradcheck(depthwise_over_time, (x, w, b))
    assert torch.autograd.gradcheck(depthwise_over_time, (x, w))
    assert torch.autograd.gradcheck(depthwise_over_time, (x.detach(), w))
    assert torch.autograd.gradcheck(depthwise_over_time, (x, w.detach()))


def test_long_and_short_recordings_learn_the_same(monkeypatch):
    x, w = torch.randn(2, 400, 6, requires_grad=True), torch.randn(6, 1, 9, requires_grad=True)
    back = torch.randn(2, 400, 6)
    here = torch.autograd.grad(depthwise_over_time(x, w), (x, w), back)
    monkeypatch.setattr(time_convs, "LONG", 10**9)
    for a, b in zip(here, torch.autograd.grad(depthwise_over_time(x, w), (x, w), back), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
