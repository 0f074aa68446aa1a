"""MossFormer (Zhao and Ma, ICASSP 2023, arXiv 2302.11824): the voices of a mixture, each by itself.

A learned filter bank turns the waveform into frames, a stack of gated single-head attention blocks finds a mask for each speaker, and
the filter bank's transpose gives waveforms. A block's attention is joint: quadratic within groups of frames, linear (a sum over all
keys) between them, so that its cost grows linearly with the length. Every projection ends in a depthwise convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.drop import Dropout
from formarium.nn.kept import kept
from formarium.nn.time_convs import depthwise_over_time
from formarium.tasks.speech_separation.model import SpeechSeparator

ROTATED = 32  # channels of queries and keys that carry a rotary position, at most


class ScaleNorm(nn.Module):
    """x / rms(x) times one learned scalar. x: float [..., dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale, self.weight = dim**-0.5, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.norm(dim=-1, keepdim=True) * self.scale).clamp_min(1e-5) * self.weight


class ConvProjection(nn.Module):
    """ScaleNorm, linear, SiLU, and on top of it a depthwise convolution over 17 frames: [b, n, dim] -> [b, n, out] (ConvM, fig. 3)."""

    def __init__(self, dim: int, out: int, dropout: float):
        super().__init__()
        self.norm, self.linear = ScaleNorm(dim), nn.Linear(dim, out)
        self.conv = nn.Conv1d(out, out, 17, padding=8, groups=out, bias=False)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.linear(self.norm(x)))
        return self.drop(x + depthwise_over_time(x, self.conv.weight))


@kept(16)
def rotations(frames: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of frame times frequency, float32 [frames, dim] each, a frequency for each pair of channels."""
    frequency = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    angle = (torch.arange(frames, dtype=torch.float32, device=device)[:, None] * frequency).repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on the first channels of x, [..., n, dim], pair by pair; the rest stays."""
    turned, rest = x[..., : cosine.shape[-1]], x[..., cosine.shape[-1] :]
    pairs = turned.unflatten(-1, (-1, 2))
    across = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    return torch.cat([turned * cosine + across * sine, rest], -1).to(x.dtype)


def joint_attention(q: Tensor, lin_q: Tensor, k: Tensor, lin_k: Tensor, v: Tensor, group: int, causal: bool, drop: nn.Module) -> Tensor:
    """relu(q k^T / g)^2 v within groups of g frames, plus lin_q (lin_k^T v) / n over all n frames (eq. 6-10).

    q, lin_q, k, lin_k: float [b, n, width]. v: float [b, n, channels]. Returns [b, n, channels].
    Frames that fill up the last group have zero keys, which neither part sees. causal: nothing comes from later frames; the linear part
    then reads the sums of the groups before, each over g.
    """
    n = v.shape[1]
    fill = -n % group
    q, lin_q, k, lin_k, v = (F.pad(t, (0, 0, 0, fill)).unflatten(1, (-1, group)) for t in (q, lin_q, k, lin_k, v))  # b groups g c
    weight = drop(F.relu(q @ k.transpose(-1, -2) / group).square())
    if causal:
        weight = weight.tril()
        summed = (lin_k.transpose(-1, -2) @ v / group).cumsum(1)
        summed = F.pad(summed, (0, 0, 0, 0, 1, 0))[:, :-1]  # of the groups before
    else:
        summed = lin_k.flatten(1, 2).transpose(-1, -2) @ v.flatten(1, 2) / n
        summed = summed[:, None]
    return (weight @ v + lin_q @ summed).flatten(1, 2)[:, :n]


class Block(nn.Module):
    """x + out((att u * v) sigmoid(att v * u)): one attention for u and v, each gated by the other's (fig. 2). x: float [b, n, dim]."""

    def __init__(self, c: MossFormer.Config):
        super().__init__()
        self.group, self.causal = c.group, c.causal
        self.hidden = ConvProjection(c.dim, int(c.dim * c.expansion), c.dropout)
        self.qk = ConvProjection(c.dim, c.qk_dim, c.dropout)
        self.gamma = nn.Parameter(0.02 * torch.randn(4, c.qk_dim))  # of the local and linear query, the local and linear key
        self.beta = nn.Parameter(torch.zeros(4, c.qk_dim))
        self.drop = Dropout(c.dropout)
        self.out = ConvProjection(2 * c.dim, c.dim, c.dropout)
        self.tap = Tap()

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        late, now = x.chunk(2, -1)
        shifted = torch.cat([F.pad(late, (0, 0, 1, -1)), now], -1)  # half of the channels one frame late
        vu = self.hidden(shifted)
        z = self.qk(shifted)[:, None] * self.gamma[:, None] + self.beta[:, None]  # b 4 n width
        q, lin_q, k, lin_k = rotate(z, cosine, sine).unbind(1)
        attended = joint_attention(q, lin_q, k, lin_k, vu, self.group, self.causal, self.drop)
        (v, u), (att_v, att_u) = vu.chunk(2, -1), attended.chunk(2, -1)
        return self.tap(x + self.out(att_u * v * torch.sigmoid(att_v * u)))


class OverChannels(nn.LayerNorm):
    """LayerNorm of each frame. x: float [b, channels, n]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def norm(kind: str, dim: int) -> nn.Module:
    """ "ln" and "gln" over channels and time of a recording, "cln" over channels, "bn" batch normalisation."""
    if kind in ("ln", "gln"):
        return nn.GroupNorm(1, dim, eps=1e-8)
    return OverChannels(dim, eps=1e-8) if kind == "cln" else nn.BatchNorm1d(dim)


class MossFormer(SpeechSeparator):
    @dataclass(frozen=True)
    class Config:
        dim: int = 512  # channels of the filter bank and of the blocks
        blocks: int = 24
        speakers: int = 2
        kernel: int = 16  # samples of a frame; frames follow at half of it
        stride: int = 8  # of the frames that are put together again
        group: int = 256  # frames that attend to one another one by one
        qk_dim: int = 128
        expansion: float = 4.0  # u and v together, over dim
        dropout: float = 0.1
        causal: bool = False
        norm: str = "ln"  # ln, gln, cln, bn
        decoder_bias: bool = False
        threshold: float = -30.0  # training leaves out mixtures whose loss is below it already

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if int(c.dim * c.expansion) != 4 * c.dim or c.dim % 2:
            raise BadInput(
                "dim, expansion", expected="an even dim, and u and v twice as wide as it (expansion 4)", got=f"{c.dim}, {c.expansion}"
            )
        self.encoder = nn.Conv1d(1, c.dim, c.kernel, c.kernel // 2, bias=False)
        self.decoder = nn.ConvTranspose1d(c.dim, 1, c.kernel, c.stride, bias=c.decoder_bias)
        self.norm_in = norm(c.norm, c.dim)
        self.project = nn.Conv1d(c.dim, c.dim, 1, bias=False)
        self.position_scale = nn.Parameter(torch.ones(1))
        self.tokens = Tap()
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.blocks))
        self.norm_blocks = nn.LayerNorm(c.dim, eps=1e-6)
        self.norm_out = norm(c.norm, c.dim)
        self.prelu = nn.PReLU()
        self.features = Tap("map")
        self.split = nn.Conv1d(c.dim, c.dim * c.speakers, 1)
        self.value, self.gate = nn.Conv1d(c.dim, c.dim, 1), nn.Conv1d(c.dim, c.dim, 1)
        self.mask = nn.Conv1d(c.dim, c.dim, 1, bias=False)

    def forward(self, mixture: Tensor) -> Tensor:
        """Waveforms [b, samples] to the speakers' waveforms [b, samples, speakers]."""
        b, samples = mixture.shape
        frames = F.relu(self.encoder(mixture[:, None]))  # b c n
        masked = frames[:, None] * self.masks(frames)
        waves = self.decoder(masked.flatten(0, 1)).view(b, self.config.speakers, -1)
        waves = F.pad(waves, (0, max(0, samples - waves.shape[-1])))[..., :samples]
        return waves.transpose(1, 2)

    def masks(self, frames: Tensor) -> Tensor:
        """Encoded frames [b, dim, n] to one mask a speaker, float [b, speakers, dim, n], at least 0."""
        b, _, n = frames.shape
        x = self.project(self.norm_in(frames))
        skip = x = x + self.position_scale * sinusoids(self.config.dim, n, x.device)
        x = self.tokens(x.transpose(1, 2))
        cosine, sine = rotations(n, min(ROTATED, self.config.qk_dim), x.device)
        for block in self.blocks:
            x = block(x, cosine, sine)
        x = self.norm_out(self.norm_blocks(x).transpose(1, 2)) + skip
        x = self.split(self.features(self.prelu(x))).unflatten(1, (self.config.speakers, -1)).flatten(0, 1)
        x = torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x))
        return F.relu(self.mask(x)).unflatten(0, (b, self.config.speakers))

    @property
    def shortest(self) -> int:
        """The fewest samples it takes."""
        return self.config.kernel


@kept(16)
def sinusoids(dim: int, frames: int, device: torch.device) -> Tensor:
    """Sines of frame times frequency, then cosines, float32 [dim, frames]."""
    frequency = 1 / (10000 ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
    angle = frequency[:, None] * torch.arange(frames, dtype=torch.float32, device=device)
    return torch.cat([angle.sin(), angle.cos()])
