import pytest
import torch
import torch.nn.functional as F

from formarium.nn import filters
from formarium.nn.filters import filter2d, gaussian_kernel, usm_sharpen


def test_spectra_give_what_the_convolution_gives(monkeypatch):
    for shape, size in (((2, 3, 37, 50), (21, 21)), ((1, 1, 64, 9), (11, 15))):
        x, kernel = torch.rand(shape), torch.rand(size)
        fast = filter2d(x, kernel)
        with monkeypatch.context() as m:
            m.setattr(filters, "MANY", 10**6)
            torch.testing.assert_close(fast, filter2d(x, kernel), rtol=1e-5, atol=1e-4)


def test_the_border_is_mirrored_as_torchs_and_goes_on_where_torch_stops():
    x, kernel = torch.rand(1, 2, 12, 11), torch.rand(5, 5)
    padded = F.pad(x, (2, 2, 2, 2), "reflect").transpose(0, 1)
    torch.testing.assert_close(filter2d(x, kernel), F.conv2d(padded, kernel[None, None]).transpose(0, 1))
    for side in (1, 2, 3):
        flat = torch.full((1, 1, side, side), 0.3)
        torch.testing.assert_close(filter2d(flat, gaussian_kernel(21)), flat)


def test_opencvs_gaussian_of_that_size():
    kernel = gaussian_kernel(51)
    assert kernel.sum() == pytest.approx(1, abs=1e-5) and kernel.sum(0)[25].item() == pytest.approx(0.04993894, abs=1e-7)  # cv2, sigma 8


def test_sharpening_steepens_edges_and_leaves_faint_detail_alone():
    edge = torch.full((1, 1, 64, 64), 0.3)
    edge[..., 32:] = 0.7
    sharp = usm_sharpen(edge)
    assert sharp[0, 0, 32, 31] < 0.28 and sharp[0, 0, 32, 32] > 0.72 and sharp.min() >= 0 and sharp.max() <= 1
    faint = 0.5 + 0.02 * torch.rand(1, 3, 64, 64)
    assert torch.equal(usm_sharpen(faint), faint)
