import pytest
import torch
import torch.nn.functional as F

from formarium.nn.ops import feed_forward as slabs
from formarium.nn.ops.activations import activate, activate_backward, gelu

LAYOUTS = {
    "rows": lambda: torch.randn(5, 7),
    "map": lambda: torch.randn(2, 6, 4, 3),
    "channels_last": lambda: torch.randn(2, 6, 4, 3).contiguous(memory_format=torch.channels_last),
    "view": lambda: torch.randn(2, 6, 4, 8)[..., ::2],
}


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_gelu_in_any_layout(layout, approximate):
    x = LAYOUTS[layout]()
    wanted, strides = F.gelu(x.clone(), approximate=approximate), x.stride()
    with torch.no_grad():
        other = gelu(x, approximate)
        assert other.data_ptr() != x.data_ptr()  # somebody may still look at x
        y = gelu(x, approximate, own=True)
    for out in (other, y):
        torch.testing.assert_close(out, wanted)
    assert y.stride() == strides and y.data_ptr() == x.data_ptr()  # in place


@pytest.mark.parametrize(("kind", "torchs"), [("gelu", F.gelu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")), ("silu", F.silu)])
def test_each_kind_is_torchs_and_in_place_only_where_nobody_minds(kind, torchs):
    x = torch.randn(5, 7)
    wanted = torchs(x.clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(activate(x, kind), wanted)
        own = x.clone()
        assert activate(own, kind, own=True).data_ptr() == own.data_ptr()
        torch.testing.assert_close(own, wanted)
    y = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(activate(y, kind, own=True).sum(), y)
    assert torch.equal(y, x)
    torch.testing.assert_close(activate_backward(torch.ones_like(x), x, kind), grad)
    with pytest.raises(ValueError, match="relu"):
        activate(x, "relu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_gradients_it_leaves_its_input_alone(layout):
    x = LAYOUTS[layout]().requires_grad_()
    before = x.detach().clone()
    y = gelu(x, own=True)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(F.gelu(x).square().sum(), x)
    torch.testing.assert_close(grad, wanted)
    assert torch.equal(x, before)


def test_inference_with_trainable_weights_keeps_no_hidden_activations(monkeypatch):
    monkeypatch.setattr(slabs, "SLAB", 3 * 24)

    def keeps(*args, **kwargs):
        raise AssertionError("the path for training, which keeps them")

    monkeypatch.setattr(slabs._Slabs, "apply", keeps)
    w1, b1, w2, b2 = (torch.randn(s, requires_grad=True) for s in ((24, 8), (24,), (5, 24), (5,)))
    x = torch.randn(40, 8)
    with torch.no_grad():
        torch.testing.assert_close(slabs.feed_forward(x, w1, b1, w2, b2), slabs.feed_forward_plain(x, w1, b1, w2, b2))
    with pytest.raises(AssertionError, match="training"):
        slabs.feed_forward(x, w1, b1, w2, b2)
