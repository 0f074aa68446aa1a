"""DenseNet as offline handwriting recognisers have it: one ink channel in, features at a sixteenth of the size, with the padding's mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.features import Tap
from formarium.nn.drop import Dropout


class Bottleneck(nn.Module):
    """A 1x1 convolution to 4 * growth channels, a 3x3 one to growth, each with batch norm and ReLU behind it; what comes out joins what
    went in.

    x: float [batch, channels, height, width]. Returns [batch, channels + growth, height, width].
    """

    def __init__(self, channels: int, growth: int, dropout: float):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(growth)
        self.dropout = Dropout(dropout)
        self.tap = Tap("map")

    def forward(self, x: Tensor) -> Tensor:
        new = self.dropout(F.relu(self.norm1(self.conv1(x)), inplace=True))
        new = self.dropout(F.relu(self.norm2(self.conv2(new)), inplace=True))
        return self.tap(torch.cat([x, new], 1))


class Transition(nn.Module):
    """Half the channels, half the size: a 1x1 convolution, batch norm, ReLU, average pooling (a last odd row or column counts alone)."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels // 2)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.dropout(F.relu(self.norm(self.conv(x)), inplace=True)), 2, ceil_mode=True)


class DenseNet(nn.Module):
    """Three dense blocks of `layers` bottlenecks (Huang et al. 2017; as in DWAP, BTTR, CoMER), total stride 16.

    forward: (image float [batch, 1, height, width], padding bool [batch, height, width], True where there is no image) to
    (features float [batch, out_channels, h, w], padding bool [batch, h, w]), h and w a sixteenth, rounded up.
    """

    def __init__(self, growth: int, layers: int, dropout: float = 0.2):
        super().__init__()
        channels = 2 * growth
        self.stem = nn.Conv2d(1, channels, 7, stride=2, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.tokens = Tap("map")
        stages, transitions = [], []
        for stage in range(3):
            stages.append(nn.ModuleList(Bottleneck(channels + i * growth, growth, dropout) for i in range(layers)))
            channels += layers * growth
            if stage < 2:
                transitions.append(Transition(channels, dropout))
                channels //= 2
        self.blocks = nn.ModuleList(stages)
        self.transitions = nn.ModuleList(transitions)
        self.norm = nn.BatchNorm2d(channels)
        self.out_channels = channels

    def forward(self, image: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(image)), inplace=True), 2, ceil_mode=True)
        x = self.tokens(x)
        for stage, blocks in enumerate(self.blocks):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
            if stage < 2:
                x = self.transitions[stage](x)
        return self.norm(x), padding[:, ::16, ::16]
