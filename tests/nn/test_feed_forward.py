import pytest
import torch

from formarium.nn.mlp import MLP
from formarium.nn.ops import feed_forward as ops


@pytest.fixture
def small_slabs(monkeypatch):
    monkeypatch.setattr(ops, "SLAB", 3 * 24)


def tensors(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


SHAPES = (3, 11, 8), (24, 8), (24,), (5, 24), (5,)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_slabs_equal_the_plain_version_forward_and_backward(small_slabs, activation):
    args = tensors(*SHAPES)
    grad = torch.randn(3, 11, 5, dtype=torch.float64)
    plain, fast = ops.feed_forward_plain(*args, activation), ops.feed_forward(*args, activation)
    torch.testing.assert_close(fast, plain)
    for a, b in zip(torch.autograd.grad(fast, args, grad), torch.autograd.grad(plain, args, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_by_finite_differences(small_slabs):
    assert torch.autograd.gradcheck(ops.feed_forward, tensors(*SHAPES))


def test_inference_leaves_its_input_alone(small_slabs):
    args = [t.detach() for t in tensors(*SHAPES)]
    before = args[0].clone()
    with torch.inference_mode():
        torch.testing.assert_close(ops.feed_forward(*args), ops.feed_forward_plain(*args))
    assert torch.equal(args[0], before)


def test_autocast_takes_the_plain_path(small_slabs):
    mlp = MLP(8, 24, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp(torch.randn(3, 11, 8)).dtype == torch.bfloat16


def test_frozen_weights_and_inputs(small_slabs):
    mlp = MLP(8, 24)
    mlp.fc1.requires_grad_(False)
    mlp(torch.randn(40, 8)).sum().backward()
    assert mlp.fc2.weight.grad is not None and mlp.fc1.weight.grad is None


def test_a_replaced_layer_is_used():
    mlp = MLP(8, 24)
    mlp.fc2 = torch.nn.Sequential(mlp.fc2, torch.nn.Tanh())
    assert mlp(torch.randn(4, 8) * 100).abs().max() <= 1
