"""Swin UNETR (Hatamizadeh et al., BrainLes 2021, arXiv 2201.01266): a Swin encoder on voxels, a residual U-Net decoder.

Tokens are patches of 2 voxels a side; four stages of shifted-window attention halve the grid and double the width. The patch embedding and
each stage's output, normalised, go through residual convolutions as skips at 1/2 .. 1/32; the raw volume is the skip at full resolution.
Each voxel gets one logit a region (overlapping regions, sigmoid) or a class (softmax), trained by the soft Dice loss

    L = 1 - 2 sum(p g) / (sum p^2 + sum g^2),   the mean over channels                       (section 3)

Its encoder can be pre-trained on volumes without masks (Tang et al., CVPR 2022, arXiv 2111.14791; nn/volume_pretraining.py): without output
channels there is no decoder but the three heads of pre-training. Given masks, a fit goes on from such a run with the decoder in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses, Turn
from formarium.model import Stage as Training
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.mlp import MLP
from formarium.nn.nd_windows import WindowAttention, offsets
from formarium.nn.volume_pretraining import UPSAMPLINGS, Answers, PretextHeads, damaged, pretext_losses, turned
from formarium.tasks.medical_segmentation.model import Rebuilt, Segmented, VolumeSegmenter, central

STRIDE = 32  # of the deepest map
# starts of the eight interleaved sub-grids, in the order that each flavour of merging concatenates them
OCTANTS = {
    "merging": [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)],
    "mergingv2": offsets(3),
    "merging_before_2025": [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)],
}
QUADRANTS = [(0, 0), (1, 0), (0, 1), (1, 1)]
ENCODER = ("embed*", "stages.*")
DECODER = ("encoders.*", "decoders.*", "head.*")
# fields of two configs that must agree for one's encoder weights to mean the same in the other
ENCODING = ("spatial_dims", "feature_size", "depths", "heads", "window", "mlp_ratio", "qkv_bias", "embed_norm", "merging", "v2")


def convolution(c: SwinUNETR.Config) -> type[nn.Module]:
    return nn.Conv3d if c.spatial_dims == 3 else nn.Conv2d


def norm_of(c: SwinUNETR.Config, channels: int, kind: str = "") -> nn.Module:
    """The normalisation of a convolution's output."""
    dims = c.spatial_dims
    match kind or c.norm:
        case "instance":
            return (nn.InstanceNorm3d if dims == 3 else nn.InstanceNorm2d)(channels, affine=c.norm_affine and not kind)
        case "batch":
            return (nn.BatchNorm3d if dims == 3 else nn.BatchNorm2d)(channels, affine=c.norm_affine)
        case "group":
            return nn.GroupNorm(c.norm_groups, channels, affine=c.norm_affine)
    raise BadInput("norm", expected="instance, batch or group", got=repr(c.norm))


class ResidualConvs(nn.Module):
    """Two 3-convolutions with a shortcut (a 1-convolution where the width changes). x: float [batch, in, *grid] -> [batch, out, *grid]."""

    def __init__(self, c: SwinUNETR.Config, in_channels: int, out: int, kind: str = ""):
        super().__init__()
        conv = convolution(c)
        self.conv1 = conv(in_channels, out, 3, padding=1, bias=False)
        self.conv2 = conv(out, out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = norm_of(c, out, kind), norm_of(c, out, kind)
        self.shortcut = in_channels != out
        if self.shortcut:
            self.conv3 = conv(in_channels, out, 1, bias=False)
            self.norm3 = norm_of(c, out, kind)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        y = self.norm2(self.conv2(y))
        return F.leaky_relu(y + (self.norm3(self.conv3(x)) if self.shortcut else x), 0.01)


class UpBlock(nn.Module):
    """The deeper map enlarged twice, beside the skip, through residual convolutions."""

    def __init__(self, c: SwinUNETR.Config, in_channels: int, out: int):
        super().__init__()
        self.up = (nn.ConvTranspose3d if c.spatial_dims == 3 else nn.ConvTranspose2d)(in_channels, out, 2, stride=2, bias=False)
        self.convs = ResidualConvs(c, 2 * out, out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.convs(torch.cat([self.up(x), skip], 1))


class Block(nn.Module):
    """x + WMSA(LN x), x + MLP(LN x). x: float [batch, *grid, dim].

    Where the grid is no larger than the window along an axis, the window is the grid there and isn't shifted; elsewhere zeros pad the grid
    (after the norm) to whole windows, and take part in attention.
    """

    def __init__(self, c: SwinUNETR.Config, dim: int, heads: int, shifted: bool, drop_path: float):
        super().__init__()
        self.window = window_of(c)
        self.shift = tuple(w // 2 if shifted else 0 for w in self.window)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, self.window, heads, c.qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * c.mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap("grid")

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        window = tuple(min(w, g) for w, g in zip(self.window, grid, strict=True))
        shift = tuple(0 if g <= w else s for s, w, g in zip(self.shift, self.window, grid, strict=True))
        y, pads = self.norm1(x), [-g % w for g, w in zip(grid, window, strict=True)]
        if any(pads):
            y = F.pad(y, [0, 0, *(side for p in reversed(pads) for side in (0, p))])
        y = self.attention(y, window, shift)
        if any(pads):
            y = y[(slice(None), *(slice(g) for g in grid))]
        x = x + self.drop(y)
        return self.tap(x + self.drop(self.mlp(self.norm2(x))))


class Merging(nn.Module):
    """Neighbours (2 a side) become one token of twice the width. x: float [batch, *grid, dim] -> [batch, *(grid / 2), 2 dim]."""

    def __init__(self, c: SwinUNETR.Config, dim: int):
        super().__init__()
        self.starts: list[tuple[int, ...]] = OCTANTS[c.merging] if c.spatial_dims == 3 else QUADRANTS  # type: ignore[assignment]
        width = dim * 2**c.spatial_dims
        self.norm = nn.LayerNorm(width)
        self.reduction = nn.Linear(width, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        odd = [g % 2 for g in x.shape[1:-1]]
        if any(odd):
            x = F.pad(x, [0, 0, *(side for p in reversed(odd) for side in (0, p))])
        x = torch.cat([x[(slice(None), *(slice(s, None, 2) for s in start))] for start in self.starts], -1)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """(v2: residual convolutions,) blocks without and with shift in turn, merging. [batch, *grid, dim] -> [batch, *(grid / 2), 2 dim]."""

    def __init__(self, c: SwinUNETR.Config, number: int, rates: list[float]):
        super().__init__()
        dim = c.feature_size * 2**number
        self.convs = ResidualConvs(c, dim, dim, "instance") if c.v2 else None
        self.blocks = nn.ModuleList([Block(c, dim, c.heads[number], i % 2 == 1, rate) for i, rate in enumerate(rates)])
        self.merge = Merging(c, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.convs is not None:
            x = self.convs(x.movedim(-1, 1).contiguous()).movedim(1, -1)
        for block in self.blocks:
            x = block(x)
        return self.merge(x)


class SwinUNETR(VolumeSegmenter):
    @dataclass(frozen=True)
    class Config:
        in_channels: int = 4
        out_channels: int = 3  # 0: no decoder, pre-training alone
        regions: tuple[tuple[int, ...], ...] = ()  # labels that make each output channel's region; empty: one class a channel, softmax
        spatial_dims: int = 3
        feature_size: int = 48
        depths: tuple[int, ...] = (2, 2, 2, 2)
        heads: tuple[int, ...] = (3, 6, 12, 24)
        window: int | tuple[int, ...] = 7
        mlp_ratio: float = 4.0
        qkv_bias: bool = True
        norm: str = "instance"  # of the convolutions: instance, batch, group
        norm_affine: bool = False
        norm_groups: int = 8
        normalise: bool = True  # a LayerNorm without parameters on what leaves the encoder
        embed_norm: bool = False
        merging: str = "merging"  # or mergingv2, merging_before_2025 (what released BraTS weights were trained with)
        v2: bool = False  # residual convolutions in front of each stage
        drop_path: float = 0.0
        cross_entropy: float = 0.0  # weight of a cross entropy beside the Dice loss
        # pre-training
        pretraining: str = ""  # how heads rebuild volumes: vae, deconv, large_kernel_deconv; "": without heads
        pretraining_share: float = 0.0  # of a fit's steps, where there is a decoder; without one all of them
        embedding: int = 512
        temperature: float = 0.5
        turn_plane: tuple[int, int] = (-2, -1)  # the two axes, counted from the last, that views are turned in
        pretraining_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of turns, contrast, rebuilding

    def __init__(self, config: Config):
        c = config
        if c.spatial_dims not in (2, 3):
            raise BadInput("spatial_dims", expected="2 or 3", got=str(c.spatial_dims))
        if c.merging not in OCTANTS:
            raise BadInput("merging", expected=", ".join(OCTANTS), got=repr(c.merging))
        if len(c.depths) != 4 or len(c.heads) != 4:
            raise BadInput("depths and heads", expected="four stages", got=f"{len(c.depths)} and {len(c.heads)}")
        if c.pretraining not in ("", *UPSAMPLINGS):
            raise BadInput("pretraining", expected=", ".join(UPSAMPLINGS), got=repr(c.pretraining))
        if not c.out_channels and not c.pretraining:
            raise BadInput("out_channels", expected="at least 1 (0 for pre-training, with pretraining given)", got="0")
        if not 0 <= c.pretraining_share < 1:
            fix = "out_channels=0 pre-trains alone"
            raise BadInput("pretraining_share", expected="from 0 to below 1", got=str(c.pretraining_share), fix=fix)
        if len({*c.turn_plane}) != 2 or not all(-c.spatial_dims <= axis < 0 for axis in c.turn_plane):
            raise BadInput("turn_plane", expected=f"two of the axes -{c.spatial_dims} .. -1", got=str(c.turn_plane))
        super().__init__(c)
        f = c.feature_size
        self.embed = convolution(c)(c.in_channels, f, 2, stride=2)
        self.embed_norm = nn.LayerNorm(f) if c.embed_norm else nn.Identity()
        self.tokens = Tap("grid")
        self.stages = nn.ModuleList([Stage(c, i, rates) for i, rates in enumerate(drop_path_rates(c.drop_path, c.depths))])
        self.encoder_channels: int | None = None  # of the file that load_encoder reads
        if self.pretrains:
            self.ssl = PretextHeads(16 * f, c.in_channels, c.pretraining, c.embedding, c.spatial_dims)
        if not c.out_channels:
            return
        widths = (c.in_channels, f, 2 * f, 4 * f, 16 * f)
        self.encoders = nn.ModuleList([ResidualConvs(c, w, f if i == 0 else w) for i, w in enumerate(widths)])
        ups = ((16, 8), (8, 4), (4, 2), (2, 1), (1, 1))
        self.decoders = nn.ModuleList([UpBlock(c, a * f, b * f) for a, b in ups])
        self.features = Tap("map")
        self.head = convolution(c)(f, c.out_channels, 1)

    @property
    def pretrains(self) -> float:
        """The share of a fit's steps that goes to pre-training."""
        c = self.config
        return 1.0 if not c.out_channels else c.pretraining_share if c.pretraining else 0.0

    def encode(self, image: Tensor) -> list[Tensor]:
        """Five maps [batch, f * 2^i, *(spatial / 2^(i + 1))] for i = 0 .. 4, normalised over channels."""
        return [self._leaving(x) for x in self._maps(image)]

    def _maps(self, image: Tensor) -> list[Tensor]:
        out = [self.tokens(self.embed_norm(self.embed(image).movedim(1, -1)))]
        for stage in self.stages:
            out.append(stage(out[-1]))
        return out

    def _leaving(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:]) if self.config.normalise else x
        return x.movedim(-1, 1).contiguous()

    def forward(self, image: Tensor) -> Tensor | Answers:
        """float [batch, channels, *spatial], sides multiples of 32, to logits [batch, out_channels, *spatial]; without a decoder to
        what the heads of pre-training say."""
        if not self.config.out_channels:
            return self.answers(image)
        x0, x1, x2, x3, x4 = self.encode(image)
        raw, first, second, third, deepest = self.encoders
        skips = (x3, third(x2), second(x1), first(x0), raw(image))
        y = deepest(x4)
        for decoder, skip in zip(self.decoders, skips, strict=True):
            y = decoder(y, skip)
        return self.head(self.features(y))

    # pre-training -----------------------------------------------------------------------------------------------------

    def answers(self, image: Tensor) -> Answers:
        """What the heads of pre-training say of volumes [batch, channels, *spatial]."""
        return self.ssl(self._leaving(self._maps(image)[-1]))

    def pretraining_loss(self, batch: Batch) -> Losses:
        """Of two views of every volume, each turned and damaged by itself. Labels aren't looked at."""
        c = self.config
        self.check_input(batch["image"])
        (one, turns), (other, more) = (turned(batch["image"], c.turn_plane) for _ in range(2))
        answers = self.answers(torch.cat([damaged(one), damaged(other)]))
        whole = torch.cat([one, other])
        return Losses(*pretext_losses(answers, torch.cat([turns, more]), whole, c.temperature, c.pretraining_weights))

    def training_stages(self) -> Sequence[Training]:
        share = self.pretrains
        if not share:
            return (Training(),)
        pre = Training("pre-train", (Turn("pretraining_loss", (*ENCODER, "ssl.*")),), share)
        return (pre,) if share == 1 else (pre, Training("fine-tune", (Turn("loss", (*ENCODER, *DECODER)),), 1 - share))

    def predict(self, batch: Batch) -> Segmented | Rebuilt:  # type: ignore[override]
        """Masks (see VolumeSegmenter); without a decoder, what is rebuilt of the volume's centre, turned and damaged at random."""
        if self.config.out_channels:
            return super().predict(batch)
        whole, turns = turned(central(batch["image"].float(), self.window_size), self.config.turn_plane)
        view = damaged(whole)
        answers = self(view)
        return Rebuilt(answers.rebuilt, view, whole, answers.turn.argmax(1), turns)

    def load_encoder(self, source: str | Path | SwinUNETR, in_channels: int | None = None) -> SwinUNETR:
        """Take the encoder's weights from a pre-trained one and leave the rest as it is; returns self.

        source: a file of weights, such as the released model_swinvit.pt (a decoder or heads in it are passed over), or a SwinUNETR, such as
        a pre-training run's. in_channels: how many channels it was trained on, where they aren't the network's: its patch embedding is then
        shared evenly, so that channels which all hold the same image give the tokens that this image gave before.
        model_swinvit.pt was trained with merging="merging_before_2025" and means the same only there.
        Raises BadCheckpoint for a file that doesn't fit, BadInput for another number of channels or a model of other settings.
        """
        self.encoder_channels = in_channels or self.config.in_channels
        try:
            if not isinstance(source, SwinUNETR):
                self.load_authors(source, skip=(*DECODER, "ssl.*"))
                return self
            for key in ENCODING:
                own, other = (getattr(m.config, key) for m in (self, source))
                if own != other:
                    raise BadInput("the encoder to take over", expected=f"{key} = {own}", got=str(other))
            state = {k: v for k, v in source.state_dict().items() if k.startswith(("embed", "stages."))}
            self.load_state_dict(self.fitted(state), strict=False)
            return self
        finally:
            self.encoder_channels = None

    def fitted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An encoder's weights with its patch embedding for the network's number of channels, while `load_encoder` asks for it."""
        weight, own = state.get("embed.weight"), self.config.in_channels
        if self.encoder_channels is None or weight is None:
            return state
        found = weight.shape[1]
        if found != self.encoder_channels:
            what = f"load_encoder(..., in_channels={found}) shares its patch embedding among the network's {own}"
            raise BadInput("the encoder to take over", expected=f"{self.encoder_channels} channels", got=str(found), fix=what)
        if found == own:
            return state
        return {**state, "embed.weight": (weight.sum(1, keepdim=True) / own).expand(-1, own, *weight.shape[2:]).clone()}

    # ------------------------------------------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        return {"*.table"}

    def check_size(self, *sides: int) -> None:
        if any(s % STRIDE for s in sides):
            raise BadInput("image size", expected=f"sides that are multiples of {STRIDE}", got="x".join(map(str, sides)), fix="predict")
        if max(sides) < 2 * STRIDE:  # the deepest map would be one voxel, which has no deviation to divide by
            raise BadInput("image size", expected=f"a side of at least {2 * STRIDE}", got="x".join(map(str, sides)))


def window_of(c: Any) -> tuple[int, ...]:
    return (c.window,) * c.spatial_dims if isinstance(c.window, int) else tuple(c.window)
