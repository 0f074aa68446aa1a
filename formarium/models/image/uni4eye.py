"""Uni4Eye (Cai et al., MICCAI 2022) and Uni4Eye++ (Cai et al., IEEE TMI 2024): one ViT for 2D images and 3D volumes, pre-trained on both.

Unified patch embedding: squares of an image and cubes of a volume have a projection each, everything behind it is shared. Pre-training
hides most patches; the encoder sees the others, and two decoders of one shape rebuild the hidden ones' intensities x and gradients |grad
x|:

    L = sum_i m_i mean((x_i' - x_i)^2) / sum_i m_i + the same for |grad x|,    m_i = 1 where patch i is hidden.

Uni4Eye++ hides by entropy (uniform noise times a patch's normalised entropy; the lowest stay visible) and has, instead of the second
decoder, a dynamic head: a controller turns decoder features and a code of the data's source into a mixing of the predicted patches.
Then the decoders go, and a linear classifier on the class token is fine-tuned with the encoder. Code: github.com/Davidczy/Uni4Eye_pp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses, Stage, Turn
from formarium.nn.attention import SelfAttention
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.mlp import MLP
from formarium.tasks.medical_classification.model import MedicalClassifier

Grid = tuple[int, ...]


# patches ------------------------------------------------------------------------------------------------------------


def patchify(x: Tensor, patch: int) -> Tensor:
    """[batch, channels, h, w] -> [batch, tokens, patch^2 channels], channels last within a patch; [batch, channels, h, w, d] -> cubes.

    Tokens are row-major over the grid; what doesn't fill a patch at the far sides is left out, as by a strided convolution.
    """
    b, c, *sides = x.shape
    grid = [n // patch for n in sides]
    if any(n % patch for n in sides):
        x = x[(..., *(slice(g * patch) for g in grid))]
    if len(grid) == 2:
        h, w = grid
        return x.reshape(b, c, h, patch, w, patch).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, patch**2 * c)
    h, w, d = grid
    return x.reshape(b, c, h, patch, w, patch, d, patch).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, h * w * d, patch**3 * c)


def unpatchify(patches: Tensor, grid: Grid, patch: int) -> Tensor:
    """The inverse: [batch, tokens, patch^rank channels] -> [batch, channels, *sides]."""
    b, c = patches.shape[0], patches.shape[2] // patch ** len(grid)
    x = patches.reshape(b, *grid, *(patch,) * len(grid), c)
    order = (0, len(x.shape) - 1, *(axis for i in range(len(grid)) for axis in (1 + i, 1 + len(grid) + i)))
    return x.permute(order).reshape(b, c, *(g * patch for g in grid))


def gradient_map(x: Tensor) -> Tensor:
    """The magnitude of the Sobel gradient, of every channel and every slice by itself: float [batch, channels, h, w(, d)], the same shape.

    An edge of height 1 gives 1; at the borders pixels repeat.
    """
    rows, columns = 2, 3
    y = torch.cat([x[:, :, :1], x, x[:, :, -1:]], rows)
    y = torch.cat([y[:, :, :, :1], y, y[:, :, :, -1:]], columns)

    def part(t: Tensor, axis: int, start: int) -> Tensor:
        return t.narrow(axis, start, t.shape[axis] - 2)

    def smooth(t: Tensor, axis: int) -> Tensor:
        return (part(t, axis, 0) + part(t, axis, 2)) / 4 + part(t, axis, 1) / 2

    def slope(t: Tensor, axis: int) -> Tensor:
        return part(t, axis, 0) - part(t, axis, 2)

    return torch.hypot(slope(smooth(y, columns), rows), slope(smooth(y, rows), columns))


def patch_entropy(patches: Tensor, channels: int) -> Tensor:
    """Entropy in bits of a patch's 256 grey levels, the mean over channels, scaled to 0..1 within each sample.

    patches: float [batch, tokens, pixels * channels] in [0, 1]. Returns [batch, tokens]; zeros where all patches' entropies are alike.
    """
    b, n, _ = patches.shape
    level = (patches * 255).round().clamp(0, 255).long().view(b, n, -1, channels).transpose(2, 3)  # b n c pixels
    count = torch.zeros(b, n, channels, 256, device=patches.device).scatter_add_(3, level, torch.ones_like(level, dtype=torch.float32))
    entropy = torch.special.entr(count / level.shape[3]).sum(3).mean(2) / math.log(2)
    low, high = entropy.aminmax(dim=1, keepdim=True)
    return (entropy - low) / (high - low).clamp_min(1e-12)


def sine_positions(grid: Grid, dim: int) -> Tensor:
    """Fixed positions [tokens, dim]: each axis has an equal share of sines and cosines, columns before rows (before slices) as in MAE.

    What doesn't divide is left zero.
    """
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    order = (1, 0, *range(2, len(grid)))  # MAE's tables have the columns first
    width = dim // (2 * len(grid))
    omega = 10000.0 ** -(torch.arange(width, dtype=torch.float64) / width)
    parts = []
    for axis in order:
        angle = axes[axis].flatten()[:, None] * omega
        parts += [angle.sin(), angle.cos()]
    return F.pad(torch.cat(parts, 1), (0, dim - 2 * width * len(grid))).float()


_cached_positions = lru_cache(maxsize=32)(sine_positions)


# modules ------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm: x + attention(LN x), then x + MLP(LN x). x: float [batch, tokens, dim]."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, eps: float, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class EncoderBlock(Block):
    def __init__(self, *args: float, prefix: int = 1):
        super().__init__(*args)  # type: ignore[arg-type]
        self.tap = Tap(prefix=prefix)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        return self.tap(super().forward(x), grid=grid)


class Decoder(nn.Module):
    """Blocks and a prediction for each rank. x: float [batch, 1 + tokens, decoder dim]; returns [batch, tokens, values of a patch]."""

    def __init__(self, c: Uni4Eye.Config):
        super().__init__()
        dim = c.decoder_dim
        self.blocks = nn.ModuleList(Block(dim, c.decoder_heads, c.mlp_ratio, c.norm_eps) for _ in range(c.decoder_depth))
        self.norm = nn.LayerNorm(dim, eps=c.norm_eps)
        self.predict2 = nn.Linear(dim, c.patch_size**2 * c.in_channels)
        self.predict3 = nn.Linear(dim, c.patch_size**2 * 3 if c.dynamic_head else c.patch_size**3)

    def forward(self, x: Tensor, rank: int) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return (self.predict2 if rank == 2 else self.predict3)(self.norm(x)[:, 1:])


class DynamicHead(nn.Module):
    """Uni4Eye++: mixes a sample's predicted patches by a matrix that a controller makes of its decoder features and its source.

    features: float [batch, 1 + tokens, dim] (non-negative); source: int64 [batch]; patches: [batch, tokens, values]. Returns the last's
    shape. For one number of tokens, that of the images it was built for.
    """

    def __init__(self, tokens: int, sources: int):
        super().__init__()
        self.tokens, self.sources = tokens, sources
        self.controller = nn.Conv1d(tokens + 1 + sources, tokens * tokens + tokens, 1)

    def forward(self, features: Tensor, source: Tensor, patches: Tensor) -> Tensor:
        n = self.tokens
        condition = torch.cat([features.mean(2), F.one_hot(source, self.sources).to(features)], 1)
        made = F.linear(condition, self.controller.weight[..., 0], self.controller.bias)
        weight, bias = made.split([n * n, n], 1)
        return torch.baddbmm(bias[..., None], weight.view(-1, n, n), patches)


class Encoded(NamedTuple):
    """latent: float [batch, 1 + visible tokens, dim]. mask: float [batch, tokens], 1 where hidden. ids_restore: int64 [batch, tokens],
    where each token stands once the visible ones are followed by the hidden ones."""

    latent: Tensor
    mask: Tensor
    ids_restore: Tensor


class Reconstruction(NamedTuple):
    """intensity, gradient: the predicted maps, [batch, channels, *sides] (the visible patches' predictions too; gradient empty without its
    branch). hidden: float [batch, 1, *sides], 1 where the encoder saw nothing."""

    intensity: Tensor
    gradient: Tensor
    hidden: Tensor


def hide(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens stay: those of the lowest noise, int(n (1 - ratio)) of them. noise: [batch, n]. Returns (their indices in that order,
    mask, ids_restore)."""
    shuffle = noise.argsort(1)
    restore = shuffle.argsort(1)
    keep = int(noise.shape[1] * (1 - ratio))
    return shuffle[:, :keep], (restore >= keep).to(noise.dtype), restore


def unshuffle(visible: Tensor, filler: Tensor, ids_restore: Tensor) -> Tensor:
    """Visible tokens [batch, k, dim] back in their places, `filler` [1, 1, dim] in the others: [batch, n, dim]."""
    b, n = ids_restore.shape
    x = torch.cat([visible, filler.expand(b, n - visible.shape[1], -1)], 1)
    return x.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))


def masked_error(prediction: Tensor, target: Tensor, mask: Tensor, normalised: bool = False) -> Tensor:
    """Mean squared error over hidden patches. prediction, target: [batch, tokens, values]; mask: [batch, tokens]; normalised: targets less
    their patch's mean, over its deviation (unbiased)."""
    if normalised:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return ((prediction - target).square().mean(-1) * mask).sum() / mask.sum()


# the network --------------------------------------------------------------------------------------------------------


class Uni4Eye(MedicalClassifier):
    @dataclass(frozen=True)
    class Config:
        image_size: int = 224
        patch_size: int = 16
        in_channels: int = 3
        num_classes: int = 2
        dim: int = 768
        depth: int = 12
        heads: int = 12
        mlp_ratio: float = 4
        norm_eps: float = 1e-6
        drop_path: float = 0.0
        pool: str = "class"  # what is classified: the class token, or the patches' "mean"
        decoder_dim: int = 512
        decoder_depth: int = 8  # 0: no decoders, for fine-tuning alone
        decoder_heads: int = 16
        mask_ratio: float = 0.75
        gradient_branch: bool = True
        entropy_masking: bool = False
        dynamic_head: bool = False
        sources: int = 7  # kinds of data that the dynamic head tells apart
        normalise_target: bool = False
        pretraining_share: float = 0.5  # of a fit's steps; 1: pre-training alone
        volume_positions: str = "sine"  # or "zero", as the weights released with Uni4Eye++ were trained

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.embed2 = nn.Conv2d(c.in_channels, c.dim, c.patch_size, c.patch_size)
        self.embed3 = nn.Conv3d(c.in_channels, c.dim, c.patch_size, c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        rates = drop_path_rates(c.drop_path, (c.depth,))[0]
        self.tokens = Tap(prefix=1)
        self.blocks = nn.ModuleList(EncoderBlock(c.dim, c.heads, c.mlp_ratio, c.norm_eps, r) for r in rates)
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        if c.pool not in ("class", "mean"):
            raise BadInput("pool", expected='"class" or "mean"', got=repr(c.pool))
        self.features = Tap(prefix=int(c.pool == "class"))
        self.head = nn.Linear(c.dim, c.num_classes) if c.num_classes else nn.Identity()
        if c.decoder_depth:
            self.decoder_embed = nn.Linear(c.dim, c.decoder_dim)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_dim))
            self.decoders = nn.ModuleList(Decoder(c) for _ in range(1 + c.gradient_branch))
            if c.dynamic_head:
                self.dynamic = DynamicHead((c.image_size // c.patch_size) ** 2, c.sources)
                self.spare = nn.Linear(50 * 1024, 2)  # in the released weights; nothing uses it
        self.initialise()

    def initialise(self) -> None:
        """As MAE: Xavier-uniform weights, the patch projections as linear layers; tokens from N(0, 0.02^2)."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for conv in (self.embed2, self.embed3):
            nn.init.xavier_uniform_(conv.weight.flatten(1))
            nn.init.zeros_(conv.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        if self.config.decoder_depth:
            nn.init.normal_(self.mask_token, std=0.02)
            if self.config.dynamic_head:  # so that the mixing starts near the identity, not near nothing
                n = self.dynamic.tokens
                nn.init.normal_(self.dynamic.controller.weight, std=1e-3)
                with torch.no_grad():
                    self.dynamic.controller.bias.copy_(torch.cat([torch.eye(n).flatten(), torch.zeros(n)]))

    # encoding ---------------------------------------------------------------------------------------------------------

    def grid(self, x: Tensor) -> Grid:
        return tuple(int(n) // self.config.patch_size for n in x.shape[2:])

    def positions(self, grid: Grid, dim: int) -> Tensor | None:
        if len(grid) == 3 and self.config.volume_positions == "zero":
            return None
        weight = self.cls_token
        make = sine_positions if torch.compiler.is_compiling() else _cached_positions  # what is traced must not be kept
        return make(grid, dim).to(weight.device, weight.dtype)

    def embed(self, patches: Tensor, rank: int, channels: int) -> Tensor:
        """Patches [batch, tokens, values] to tokens [batch, tokens, dim]: what the strided convolution does. A grey volume meets the sum of
        the kernel over its channels, which is the same as repeating it."""
        conv = self.embed2 if rank == 2 else self.embed3
        weight = conv.weight if channels == conv.in_channels else conv.weight.sum(1, keepdim=True)
        return F.linear(patches, weight.movedim(1, -1).flatten(1), conv.bias)

    def embedded(self, x: Tensor) -> Tensor:
        """All tokens of an image or a volume, without positions: [batch, tokens, dim]."""
        return self.embed(patchify(x, self.config.patch_size), x.ndim - 2, x.shape[1])

    def forward(self, image: Tensor) -> Tensor:
        """[batch, channels, height, width] or [batch, 1 or channels, height, width, depth], normalised, to logits [batch, classes]."""
        grid, x = self.grid(image), self.embedded(image)
        table = self.positions(grid, x.shape[2])
        x = x if table is None else x + table
        x = self.tokens(torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], 1), grid=grid)
        for block in self.blocks:
            x = block(x, grid)
        if self.config.pool == "mean":  # as MAE pools: the mean first, then the norm
            return self.head(self.norm(self.features(x[:, 1:], grid=grid).mean(1)))
        return self.head(self.features(self.norm(x), grid=grid)[:, 0])

    def encode(self, x: Tensor, noise: Tensor | None = None, ratio: float | None = None, patches: Tensor | None = None) -> Encoded:
        """The encoder on what isn't hidden. noise: float [batch, tokens], drawn where not given: the lowest stay. patches: x's, if at
        hand."""
        c, grid = self.config, self.grid(x)
        patches = patchify(x, c.patch_size) if patches is None else patches
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=x.device)
        keep, mask, restore = hide(noise, c.mask_ratio if ratio is None else ratio)
        visible = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[2]))  # only these are embedded
        tokens = self.embed(visible, len(grid), x.shape[1])
        table = self.positions(grid, c.dim)
        if table is not None:
            tokens = tokens + table[keep]
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1).to(tokens.dtype), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return Encoded(self.norm(tokens), mask, restore)

    # pre-training -----------------------------------------------------------------------------------------------------

    def decode(self, encoded: Encoded, grid: Grid, source: Tensor | None = None) -> list[Tensor]:
        """What each branch says of every patch: [batch, tokens, values], the intensities first."""
        if not self.config.decoder_depth:
            raise BadInput("pre-training", expected="a model with decoders", got="decoder_depth=0")
        x = self.decoder_embed(encoded.latent)
        patches = unshuffle(x[:, 1:], self.mask_token.to(x.dtype), encoded.ids_restore)
        table = self.positions(grid, self.config.decoder_dim)
        x = torch.cat([x[:, :1], patches if table is None else patches + table], 1)
        if not self.config.dynamic_head:
            return [decoder(x, len(grid)) for decoder in self.decoders]
        if math.prod(grid) != self.dynamic.tokens or len(grid) != 2:
            raise BadInput("dynamic head", expected=f"images of {self.dynamic.tokens} patches", got=f"a grid {grid}",
                           fix="pre-train on volumes and other sizes without it")  # fmt: skip
        x = F.relu(x)  # the released code rectifies in place, so the decoder sees this too
        source = torch.zeros(len(x), dtype=torch.int64, device=x.device) if source is None else source
        return [self.dynamic(x, source, decoder(x, 2)) for decoder in self.decoders]

    def pretraining_loss(self, batch: Batch) -> Losses:
        """Masked patches' intensities and gradients. batch["source"], int64 [batch], is the dynamic head's code (0 where not given)."""
        count, total, terms = len(batch["image"]), [], {}
        for index, part in self.parts(batch):
            image, share = self.normalise(part["image"]), len(index) / count
            patches = patchify(image, self.config.patch_size)
            encoded = self.encode(image, self.noise(part["image"]), patches=patches)
            said = self.decode(encoded, self.grid(image), part.get("source"))
            targets = [patches, patchify(gradient_map(image), self.config.patch_size)]
            for name, prediction, target in zip(("intensity", "gradient"), said, targets, strict=False):
                if target.shape[2] != prediction.shape[2]:  # three channels alike: one is predicted
                    target = target.unflatten(2, (prediction.shape[2], -1))[..., 0]
                error = masked_error(prediction.float(), target, encoded.mask, self.config.normalise_target)
                total.append(share * error)
                terms[f"{name}_{image.ndim - 2}d"] = error
        return Losses(torch.stack(total).sum(), terms)

    def noise(self, image: Tensor) -> Tensor:
        """What decides which patches are hidden, float [batch, tokens]: uniform, times their entropy where the config says so. image: in
        [0, 1]."""
        noise = torch.rand(len(image), math.prod(self.grid(image)), device=image.device)
        if not self.config.entropy_masking:
            return noise
        return noise * patch_entropy(patchify(image, self.config.patch_size), image.shape[1])

    @torch.no_grad()
    def reconstruct(self, image: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """What pre-training rebuilds of normalised images or volumes; noise as in `encode`."""
        grid, patch = self.grid(image), self.config.patch_size
        encoded = self.encode(image, noise)
        maps = [unpatchify(x, grid, patch) for x in self.decode(encoded, grid)]
        hidden = encoded.mask[..., None].expand(-1, -1, patch ** len(grid))
        return Reconstruction(maps[0], maps[1] if len(maps) > 1 else image.new_empty(0), unpatchify(hidden, grid, patch))

    def training_stages(self) -> Sequence[Stage]:
        encoder = ("embed*", "cls_token", "blocks.*", "norm.*")
        decoders = ("decoder_embed.*", "mask_token", "decoders.*", "dynamic.*")
        share = self.config.pretraining_share if self.config.decoder_depth else 0.0
        pre = Stage("pre-train", (Turn("pretraining_loss", (*encoder, *decoders)),), share)
        tuned = Stage("fine-tune", (Turn("loss", (*encoder, "head.*")),), 1 - share)
        return ((pre,) if share else ()) + ((tuned,) if self.config.num_classes and share < 1 else ())

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "mask_token"}

    def check_size(self, sides: tuple[int, ...]) -> None:
        patch = self.config.patch_size
        if any(n % patch for n in sides):
            fix = "pad or resize it"
            raise BadInput("image size", expected=f"multiples of {patch}", got="x".join(map(str, sides)), fix=fix)
