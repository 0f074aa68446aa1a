import pytest
import torch
import torch.nn.functional as F

from formarium.nn.time_convs import depthwise_over_time


@pytest.mark.parametrize("kernel", [1, 5, 8, 17])
def test_it_is_conv1d_with_as_many_frames(kernel):
    x, w, b = torch.randn(2, 20, 6), torch.randn(6, 1, kernel), torch.randn(6)
    padded = F.pad(x.transpose(1, 2), ((kernel - 1) // 2, kernel // 2))
    torch.testing.assert_close(depthwise_over_time(x, w, b), F.conv1d(padded, w, b, groups=6).transpose(1, 2), atol=1e-5, rtol=1e-5)
