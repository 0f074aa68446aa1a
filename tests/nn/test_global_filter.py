import pytest
import torch

from formarium.nn.global_filter import GlobalFilter, filter_by_fft, filter_by_products, resize_response


def response(h: int, w: int, c: int = 3) -> torch.Tensor:
    return torch.randn(h, w // 2 + 1, c, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (4, 6), (5, 7), (8, 5), (1, 9), (14, 14)])
def test_products_and_transforms_agree_on_any_size(grid):
    x, weight = torch.randn(2, *grid, 3, dtype=torch.float64, requires_grad=True), response(*grid).requires_grad_()
    fast, plain = filter_by_products(x, weight), filter_by_fft(x, weight)
    torch.testing.assert_close(fast, plain)
    for a, b in zip(torch.autograd.grad(fast.sin().sum(), (x, weight)), torch.autograd.grad(plain.sin().sum(), (x, weight)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_it_is_one_circular_convolution_per_channel(grid):
    x, weight = torch.randn(1, *grid, 3, dtype=torch.float64), response(*grid)
    kernel = torch.fft.irfft2(torch.view_as_complex(weight), s=grid, dim=(0, 1))
    slow = sum(kernel[i, j] * x.roll((i, j), (1, 2)) for i in range(grid[0]) for j in range(grid[1]))
    torch.testing.assert_close(filter_by_products(x, weight), slow)


def test_one_everywhere_is_the_identity_at_any_size():
    layer = GlobalFilter(3, (6, 8))
    layer.weight.data[..., 0], layer.weight.data[..., 1] = 1, 0
    for size in ((6, 8), (5, 9), (12, 3), (70, 66)):  # the last one by transforms
        x = torch.randn(2, *size, 3)
        torch.testing.assert_close(layer(x), x, atol=1e-5, rtol=1e-5)


def test_another_size_keeps_the_kernel_in_pixels():
    """A small kernel, given as its response on a 16x16 grid, is nearly itself on other grids."""
    kernel = torch.zeros(16, 16, 1, dtype=torch.float64)
    kernel[0, 0], kernel[0, 1], kernel[1, 0], kernel[15, 0] = 1.0, 0.5, -0.3, 0.2
    weight = torch.view_as_real(torch.fft.rfft2(kernel, dim=(0, 1)))
    new = resize_response(weight, (16, 16), (24, 20))
    back = torch.fft.irfft2(torch.view_as_complex(new), s=(24, 20), dim=(0, 1))
    wanted = torch.zeros(24, 20, 1, dtype=torch.float64)
    wanted[0, 0], wanted[0, 1], wanted[1, 0], wanted[23, 0] = 1.0, 0.5, -0.3, 0.2
    assert (back - wanted).abs().max() < 0.03
    assert resize_response(weight, (16, 16), (16, 16)) is weight


def test_the_imaginary_part_of_a_frequency_that_mirrors_itself_has_no_effect():
    x, weight = torch.randn(1, 4, 6, 3, dtype=torch.float64), response(4, 6)
    other = weight.clone()
    for row in (0, 2):
        for column in (0, 3):
            other[row, column, :, 1] += 5
    for by in (filter_by_products, filter_by_fft):
        torch.testing.assert_close(by(x, other), by(x, weight))


def test_under_autocast_and_in_bfloat16_it_computes_in_float32():
    layer, x = GlobalFilter(4, (7, 6)), torch.randn(2, 7, 6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x), layer(x.float()))
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    exact = layer(x)
    half = layer.bfloat16()(x.bfloat16())
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()
    half.sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
