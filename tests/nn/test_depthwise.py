import torch
import torch.nn.functional as F

from formarium.nn.depthwise import ResidualDepthwise


def test_the_residual_is_in_the_kernel_of_a_depthwise_convolution():
    layer = ResidualDepthwise(5)
    x = torch.randn(2, 6, 7, 5)
    plain = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=1, groups=5).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), x + plain)
