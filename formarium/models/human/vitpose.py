"""ViTPose (Xu et al., NeurIPS 2022, arXiv 2204.12484): a plain vision transformer finds a person's joints.

A person is cut out (top-down), split into 16 x 16 patches, and N identical blocks work on them at one resolution, without class token or
pyramid. A light decoder turns the last tokens into a heat-map a joint, at a quarter of the image's resolution:

    classic   2 x [deconvolution 4x4 stride 2, BN, ReLU], 1x1 convolution         (eq. 2)
    simple    4x bilinear upsampling of ReLU(F), 3x3 convolution                   (eq. 3)

Trained on the squared error to Gaussian maps of the annotated joints. A knowledge token that a large model has learnt, one vector for all
images, can be put beside a smaller model's tokens, with or without the large model's heat-maps as further targets (section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses, Stage, Turn
from formarium.nn.attention import SelfAttention, merge_heads, split_heads
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.heatmaps import gaussian_targets, heatmap_loss
from formarium.nn.init import init_transformer
from formarium.nn.mlp import MLP
from formarium.nn.positions import resize_table
from formarium.tasks.human_pose.model import PoseEstimator, check_keypoints

Grid = tuple[int, int]


class Attention(SelfAttention):
    """Plain self-attention over all patches. x: float [batch, tokens, dim]. scale: None for 1 / sqrt(width of a head)."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, scale: float | None):
        super().__init__(dim, heads, qkv_bias)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.heads, 3)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale)))


class Block(nn.Module):
    """Pre-norm: x + MHSA(LN x), then x + FFN(LN x) (eq. 1). x: float [batch, h w (+ 1), dim]; every block keeps the resolution."""

    def __init__(self, c: ViTPose.Config, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.attention = Attention(c.dim, c.heads, c.qkv_bias, c.qk_scale)
        self.norm2 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.mlp = MLP(c.dim, int(c.dim * c.mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap()

    def forward(self, x: Tensor, grid: Grid | None) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        x = x + self.drop(self.mlp(self.norm2(x)))
        return self.tap(x, grid=grid)


class Decoder(nn.Module):
    """The two decoders in one form: upsample (simple) or deconvolve (classic), then a convolution to one map a joint.

    forward: features [batch, dim, h, w] to heat-maps [batch, joints, s h, s w].
    """

    def __init__(self, c: ViTPose.Config):
        super().__init__()
        self.upsample, self.align_corners = c.upsample, c.align_corners
        layers: list[nn.Module] = []
        width = c.dim
        for filters, kernel in zip(c.deconv_filters, c.deconv_kernels, strict=True):
            padding, extra = {4: (1, 0), 3: (1, 1), 2: (0, 0)}[kernel]
            layers += [
                nn.ConvTranspose2d(width, filters, kernel, 2, padding, extra, bias=False),
                nn.BatchNorm2d(filters),
                nn.ReLU(inplace=True),
            ]
            width = filters
        self.deconv = nn.Sequential(*layers)
        last: list[nn.Module] = []
        for kernel in c.head_conv_kernels:
            last += [nn.Conv2d(width, width, kernel, padding=(kernel - 1) // 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        if c.final_kernel:
            last.append(nn.Conv2d(width, c.num_joints, c.final_kernel, padding=c.final_kernel // 2))
        self.final = nn.Identity() if not c.final_kernel else last[0] if len(last) == 1 else nn.Sequential(*last)
        for m in self.modules():  # so that maps start near zero
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(m.weight, std=0.001)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample:
            x = F.interpolate(F.relu(x), scale_factor=self.upsample, mode="bilinear", align_corners=self.align_corners)
        return self.final(self.deconv(x.contiguous() if len(self.deconv) else x))  # deconvolutions are slow on channels-last maps


class ViTPose(PoseEstimator):
    @dataclass(frozen=True)
    class Config:
        dim: int = 768
        depth: int = 12
        heads: int = 12
        mlp_ratio: float = 4.0
        qkv_bias: bool = True
        qk_scale: float | None = None
        norm_eps: float = 1e-6
        last_norm: bool = True
        image_size: tuple[int, int] = (256, 192)  # (height, width); the position table is resized for other sizes
        patch: int = 16
        ratio: int = 1  # patches overlap ratio-fold: their stride is patch / ratio
        drop_path: float = 0.0
        num_joints: int = 17
        upsample: int = 0  # bilinear, before the decoder's convolutions; 4 is the simple decoder
        align_corners: bool = False
        deconv_filters: tuple[int, ...] = (256, 256)  # () for the simple decoder
        deconv_kernels: tuple[int, ...] = (4, 4)
        head_conv_kernels: tuple[int, ...] = ()
        final_kernel: int = 1
        sigma: float = 2.0  # of the target Gaussians, in pixels of the map
        knowledge: str = ""  # "learn": a teacher's token is what trains; "use": the token of a teacher stands beside the patches, frozen
        knowledge_dim: int = 0  # of the teacher, where another than dim (then projected)

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.knowledge not in ("", "learn", "use"):
            raise BadInput("knowledge", expected='"", "learn" or "use"', got=repr(c.knowledge))
        self.grid = (self.image_size[0] // c.patch * c.ratio, self.image_size[1] // c.patch * c.ratio)
        self.embed = nn.Conv2d(3, c.dim, c.patch, c.patch // c.ratio, padding=4 + 2 * (c.ratio // 2 - 1))
        # the first entry belonged to a class token in pre-training; it is added to every patch
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + self.grid[0] * self.grid[1], c.dim), std=0.02))
        self.tokens = Tap()
        self.blocks = nn.ModuleList([Block(c, rate) for rate in drop_path_rates(c.drop_path, (c.depth,))[0]])
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps) if c.last_norm else nn.Identity()
        self.features = Tap()
        init_transformer(self)
        self.head = Decoder(c)
        if c.knowledge:
            width = c.knowledge_dim or c.dim
            self.knowledge = nn.Parameter(torch.randn(1, 1, width) * 0.02, requires_grad=c.knowledge == "learn")
            self.knowledge_in = nn.Linear(width, c.dim) if width != c.dim else nn.Identity()
        self._teacher: list[ViTPose] = []  # in a list, so that its weights are no part of this model

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [batch, 3, height, width] to heat-maps [batch, joints, height / 4, width / 4]."""
        return self.head(self.encode(image))

    def encode(self, image: Tensor) -> Tensor:
        """The backbone's map [batch, dim, h, w]."""
        x = self.embed(image)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # b (h w) c
        table = self.positions[:, 1:]
        fits = isinstance(x.shape[1], int) and x.shape[1] == table.shape[1]  # as released, whatever the grid's shape
        x = x + (table if fits else resize_table(table, self.grid, grid, mode="bicubic")) + self.positions[:, :1]
        x = self.tokens(x, grid=grid)
        patches = x.shape[1]
        if self.config.knowledge:
            x = torch.cat([x, self.knowledge_in(self.knowledge).expand(x.shape[0], -1, -1)], 1)
        for block in self.blocks:
            x = block(x, None if self.config.knowledge else grid)
        x = self.features(self.norm(x[:, :patches]), grid=grid)
        return x.transpose(1, 2).unflatten(2, grid)

    def loss(self, batch: Batch) -> Losses:
        """The mean squared error of the maps, and where there is a teacher that to the teacher's maps."""
        check_keypoints(batch, self.config.num_joints)
        image = self.normalise(batch["image"])
        maps = self(image)
        targets, weights = self.targets(batch, maps)
        terms = {"heatmap": heatmap_loss(maps, targets, weights)}
        for teacher in self._teacher:
            with torch.no_grad():
                theirs = teacher.eval()(image).float()
            terms["teacher"] = heatmap_loss(maps, theirs, torch.ones_like(weights))
        return Losses(sum(terms.values(), start=torch.zeros((), device=maps.device)), terms)

    def targets(self, batch: Batch, maps: Tensor) -> tuple[Tensor, Tensor]:
        """(target maps, weights [batch, joints]) of a batch's keypoints, at the size of the maps."""
        h, w = batch["image"].shape[2:]
        stride = batch["keypoints"].new_tensor([(w - 1) / (maps.shape[-1] - 1), (h - 1) / (maps.shape[-2] - 1)])
        return gaussian_targets(batch["keypoints"] / stride, batch["visible"], (maps.shape[-2], maps.shape[-1]), self.config.sigma)

    def training_stages(self) -> Sequence[Stage]:
        """One stage; a teacher that learns its knowledge token moves nothing else."""
        if self.config.knowledge == "learn":
            return (Stage("knowledge", (Turn(train=("knowledge",)),)),)
        return (Stage(),)

    def distil_from(self, teacher: ViTPose) -> ViTPose:
        """Learn from a larger, trained model: its knowledge token, where both have one, and its maps as further targets. Returns self."""
        if teacher.config.num_joints != self.config.num_joints:
            raise BadInput("teacher", expected=f"{self.config.num_joints} joints", got=str(teacher.config.num_joints))
        if self.config.knowledge == "use":
            if not teacher.config.knowledge or teacher.knowledge.shape != self.knowledge.shape:
                raise BadInput(
                    "teacher", expected=f'a knowledge token of width {self.knowledge.shape[-1]} (knowledge="learn")', got="none such"
                )
            with torch.no_grad():
                self.knowledge.copy_(teacher.knowledge)
        self._teacher = [teacher.requires_grad_(False).to(self.device)]
        return self

    def no_weight_decay(self) -> set[str]:
        return {"positions", "knowledge"}

    def check_size(self, height: int, width: int) -> None:
        least = self.config.patch
        if height < least or width < least:
            raise BadInput("image size", expected=f"at least {least}x{least}", got=f"{height}x{width}", fix="resize the image")
