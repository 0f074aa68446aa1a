"""VDT, a video diffusion transformer (Lu et al., ICLR 2024, arXiv 2305.13311).

DiT's blocks, each with a temporal attention before the spatial one. Every frame is cut into patches; temporal attention mixes a patch
with the same patch of the other frames, spatial attention the patches of a frame. One network learns every way of completing a clip:
it sees x_0 (1 - M) + x_t M, known pixels clean and the others noisy, and predicts the noise where M = 1 (section 3.4).

Config.conditioning names the three ways to give a video's first frames that the paper compares for prediction (section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput, UnknownName
from formarium.features import Tap
from formarium.model import Batch, Losses
from formarium.nn.attention import SelfAttention, merge_heads, split_heads
from formarium.nn.diffusion import GaussianDiffusion, TimestepEmbedder, beta_schedule, sincos_grid, sincos_table
from formarium.nn.mlp import between
from formarium.tasks.video_generation.masks import condition_mask
from formarium.tasks.video_generation.model import VideoGenerator, Videos

SAMPLERS = ("ddpm", "ddim", "dpm-solver")
CONDITIONING = ("mask", "concat", "cross", "adaln")
TEMPORAL = ("prediction", "backward", "interpolation", "unconditional", "animation", "random")  # drawn alike in training


class TemporalAttention(nn.Module):
    """Attention along time at each place, and a projection that starts the branch: Linear(Attn(LN x)).

    x: float [batch, frames, patches, dim]. Returns the same shape. The step modulates nothing here.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, n, d = x.shape
        y = self.attention(self.norm(x).transpose(1, 2).reshape(b * n, t, d))
        return self.out(y).view(b, n, t, d).transpose(1, 2)


class KnownAttention(nn.Module):
    """Cross-attention of every noisy token to all tokens of the known frames: Linear(Attn(q = LN x, k = v = LN known)).

    x: float [batch, frames, patches, dim]; known: float [batch, known frames, patches, dim]. Returns x's shape.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_known = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        (q,) = split_heads(self.q(self.norm(x).flatten(1, 2)), self.heads)
        k, v = split_heads(self.kv(self.norm_known(known).flatten(1, 2)), self.heads, 2)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v))).view_as(x)


class KnownFeatures(nn.Module):
    """Known frames as one vector for adaLN: the mean of their tokens, which know their places, after Linear, SiLU, Linear.

    known: float [batch, frames, patches, dim]. Returns [batch, dim].
    """

    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, known: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(known))).mean((1, 2))


class Block(nn.Module):
    """Temporal attention, then DiT's block of spatial attention and MLP, both under adaLN-Zero, alike in all frames.

    x: float [batch, frames, patches, dim]; condition: float [batch, dim]; known: tokens of the known frames, which cross-attention (after
    the temporal one) reads. The tap reads x between attention and MLP.
    """

    def __init__(self, c: VDT.Config):
        super().__init__()
        dim, hidden = c.hidden_size, int(c.hidden_size * c.mlp_ratio)
        if c.temporal:
            self.temporal = TemporalAttention(dim, c.num_heads)
        if c.conditioning == "cross":
            self.cross = KnownAttention(dim, c.num_heads)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = SelfAttention(dim, c.num_heads)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.tap = Tap()

    def forward(self, x: Tensor, condition: Tensor, grid: tuple[int, int, int], known: Tensor | None = None) -> Tensor:
        b, t, n, d = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None, None].chunk(6, -1)
        if hasattr(self, "temporal"):
            x = x + self.temporal(x)
        if known is not None and known.shape[1] and hasattr(self, "cross"):
            x = x + self.cross(x, known)
        y = modulate(self.norm(x), shift1, scale1)
        x = x + gate1 * self.attention(y.reshape(b * t, n, d)).view(b, t, n, d)
        x = self.tap(x.flatten(1, 2), grid=grid).view(b, t, n, d)
        y = between(modulate(self.norm(x), shift2, scale2), self.fc1, self.fc2, "gelu_tanh")
        return x + gate2 * y


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class VDT(VideoGenerator):
    @dataclass(frozen=True)
    class Config:
        hidden_size: int = 384
        depth: int = 12
        num_heads: int = 6
        patch_size: int = 2
        mlp_ratio: float = 4.0
        num_frames: int = 16
        frame_size: int = 256  # pixels
        channels: int = 3
        latent_channels: int = 4  # 0: it works on pixels
        latent_factor: int = 8  # pixels along a side of a latent
        num_classes: int = 1000  # rows of DiT's label table; class 0 stands for every clip
        class_dropout: float = 0.1  # how often training takes the extra row in its place
        learn_sigma: bool = True
        temporal: bool = True  # without: DiT, frame by frame
        # how known frames reach the network: as released, clean in their places under any mask; or, for prediction from the first frames,
        # those as tokens in front of the noisy ones (concat), by cross-attention (cross), or in the norms' shifts and scales (adaln)
        conditioning: str = "mask"
        zero_init: bool = True  # gates, shifts and the last layer start at zero; otherwise as other layers
        # objective
        diffusion_steps: int = 1000
        schedule: str = "linear"
        prediction: str = "epsilon"  # what the network says: the noise, the clean clip ("start") or the velocity ("v")
        bound_weight: float = 1.0  # of the variance's bound in the loss
        mask_bound: bool = False  # take the bound where a clip is generated only; the released code takes it everywhere
        known_frames: int = 0  # in prediction and backward prediction; 0: half of them
        interpolation_step: int = 4
        random_ratio: float = 0.8  # of frames masked in "random"
        completion_share: float = 0.2  # of training clips whose mask is spatial
        completion_area: float = 0.5
        # sampling
        sampler: str = "ddpm"  # ddpm, ddim, dpm-solver
        sampling_steps: int = 250
        eta: float = 0.0  # ddim's

    def __init__(self, config: Config):
        super().__init__(config)
        c, dim = config, config.hidden_size
        if c.sampler not in SAMPLERS:
            raise UnknownName("sampler", c.sampler, SAMPLERS)
        if c.conditioning not in CONDITIONING:
            raise UnknownName("conditioning", c.conditioning, CONDITIONING)
        self.known = c.known_frames or c.num_frames // 2  # frames given in prediction
        if c.conditioning != "mask" and not 0 < self.known < c.num_frames:
            raise BadInput("known_frames", expected=f"1 to {c.num_frames - 1} of {c.num_frames}", got=str(self.known))
        if self.input_size % c.patch_size:
            raise BadInput("frame_size", expected=f"a multiple of {c.patch_size * c.latent_factor}", got=str(c.frame_size))
        self.out_channels = self.in_channels * (2 if c.learn_sigma else 1)
        side = self.input_size // c.patch_size
        self.grid = (c.num_frames, side, side)
        self.patch_embed = nn.Conv2d(self.in_channels, dim, c.patch_size, c.patch_size)
        self.positions = nn.Parameter(torch.from_numpy(sincos_grid(side, side, dim)).float()[None], requires_grad=False)
        if c.temporal:
            self.times = nn.Parameter(torch.from_numpy(sincos_table(np.arange(c.num_frames), dim)).float()[None], requires_grad=False)
        self.step_embed = TimestepEmbedder(dim)
        self.label_embed = nn.Embedding(c.num_classes + (c.class_dropout > 0), dim)
        if c.conditioning == "adaln":
            self.known_embed = KnownFeatures(dim)
        self.tokens = Tap()
        self.blocks = nn.ModuleList([Block(c) for _ in range(c.depth)])
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.features = Tap()
        self.head = nn.Linear(dim, c.patch_size**2 * self.out_channels)
        self.diffusion = GaussianDiffusion(
            beta_schedule(c.schedule, c.diffusion_steps), c.prediction, "learned_range" if c.learn_sigma else "fixed_large"
        )
        self._init()

    def _init(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.bias)
        for weight in (self.label_embed.weight, self.step_embed.fc1.weight, self.step_embed.fc2.weight):
            nn.init.normal_(weight, std=0.02)
        if self.config.zero_init:
            for m in (self.modulation, self.head, *(block.modulation for block in self.blocks)):
                nn.init.zeros_(m.weight)

    def forward(self, x: Tensor, t: Tensor, known: int | None = None) -> Tensor:
        """x float [batch, frames, channels, h, w] (noisy where it is to be generated) and t int64 [batch], the diffusion step, to
        the noise (or what Config.prediction says) and, where the variance is learned, its values: [batch, frames, channels (* 2), h, w].

        known: how many of the first frames are given (by default as in training). Read by all ways of conditioning but the mask, whose
        output is that of the other frames: [batch, frames - known, ...].
        """
        c, (frames, h, w), b = self.config, self.grid, x.shape[0]
        first = 0 if c.conditioning == "mask" else self.known if known is None else known
        x = self.patch_embed(x.flatten(0, 1)).flatten(2).transpose(1, 2) + self.positions  # (b t) n d
        x = x.view(b, frames, h * w, c.hidden_size)
        if c.temporal:
            x = x + self.times[:, :, None]
        condition = self.step_embed(t) + self.label_embed(self._labels(t))
        given = None
        if c.conditioning in ("cross", "adaln"):  # the noisy frames alone are tokens
            given, x, frames = x[:, :first], x[:, first:], frames - first
            if c.conditioning == "adaln" and first:
                condition = condition + self.known_embed(given)
        grid = (frames, h, w)
        x = self.tokens(x.flatten(1, 2), grid=grid).view(b, frames, h * w, c.hidden_size)
        for block in self.blocks:
            x = block(x, condition, grid, given)
        shift, scale = self.modulation(F.silu(condition))[:, None, None].chunk(2, -1)
        x = self.features(modulate(self.norm(x), shift, scale).flatten(1, 2), grid=grid)
        p = c.patch_size
        x = self.head(x).view(b, frames, h, w, p, p, self.out_channels).permute(0, 1, 6, 2, 4, 3, 5)
        x = x.reshape(b, frames, self.out_channels, h * p, w * p)
        return x[:, first:] if c.conditioning == "concat" else x

    def check_input(self, x: Any, t: Any, known: int | None = None) -> None:
        super().check_input(x, t)
        if known is not None and not 0 <= known < self.config.num_frames:
            raise BadInput("known", expected=f"0 to {self.config.num_frames - 1} frames", got=str(known))

    def _labels(self, t: Tensor) -> Tensor:
        zeros = torch.zeros_like(t)
        if not self.training or not self.config.class_dropout:
            return zeros
        return torch.where(torch.rand(t.shape, device=t.device) < self.config.class_dropout, self.config.num_classes, zeros)

    def network(self, x: Tensor, t: Tensor, known: int | None = None) -> tuple[Tensor, Tensor | None]:
        """(prediction, values of the variance or None), each shaped as x or as its generated frames (see forward)."""
        out = self(x, t) if known is None else self(x, t, known)
        return (out[:, :, : self.in_channels], out[:, :, self.in_channels :]) if self.config.learn_sigma else (out, None)

    def forward_batch(self, batch: Batch) -> Tensor:
        """The network on a batch with its unknown part (where known frames aren't given by a mask: the frames that training generates) at
        the middle of the noise."""
        x0 = self.encode(batch)
        mask = self.mask_of(batch, x0)[:, :, None]
        if self.config.conditioning != "mask":
            mask = (torch.arange(x0.shape[1], device=x0.device) >= self.known).to(x0).view(1, -1, 1, 1, 1)
        t = torch.full((len(x0),), self.config.diffusion_steps // 2, device=x0.device)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
        return self(x0 * (1 - mask) + self.diffusion.q_sample(x0, t, noise) * mask, t)

    # what it learns

    def loss(self, batch: Batch) -> Losses:
        """Masked denoising under a mask drawn for each clip (without masks: of the frames after the known ones), at a step drawn for each;
        the variance's bound, where it is learned."""
        x0 = self.encode(batch)
        t, noise = torch.randint(self.config.diffusion_steps, (len(x0),), device=x0.device), torch.randn_like(x0)
        if self.config.conditioning == "mask":
            terms = self.masked_losses(x0, t, noise, self.draw_masks(x0))
        else:
            terms = self.prediction_losses(x0, t, noise)
        means = {name: value.mean() for name, value in terms.items()}
        return Losses(means["mse"] + self.config.bound_weight * means.get("vb", 0.0), means)

    def masked_losses(self, x0: Tensor, t: Tensor, noise: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """One value a clip: "mse" where mask [batch, frames, h, w] is 1 (its mean is over all positions), and "vb" over all positions
        (or, by Config.mask_bound, where mask is 1)."""
        mask = mask[:, :, None]
        x_t = self.diffusion.q_sample(x0, t, noise)
        said, values = self.network(x0 * (1 - mask) + x_t * mask, t)
        values = None if values is None else values.float()
        return self.diffusion.losses(said.float(), values, x0, x_t, t, noise, mask, mask if self.config.mask_bound else None)

    def prediction_losses(self, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """One value a clip: "mse" and "vb" of the frames after the known ones, which nothing is asked of (section 3.3)."""
        start, noise = x0[:, self.known :], noise[:, self.known :]
        x_t = self.diffusion.q_sample(start, t, noise)
        said, values = self.network(torch.cat([x0[:, : self.known], x_t], 1), t)
        return self.diffusion.losses(said.float(), None if values is None else values.float(), start, x_t, t, noise)

    def draw_masks(self, x: Tensor) -> Tensor:
        """A mask for each clip of x, float [batch, frames, h, w]: spatial for a share of them, else one of six temporal kinds."""
        c = self.config
        rng = np.random.default_rng(int(torch.randint(2**62, (1,))))
        masks = []
        for _ in range(len(x)):
            kind = "completion" if rng.random() < c.completion_share else TEMPORAL[rng.integers(len(TEMPORAL))]
            how = {"known": c.known_frames, "step": c.interpolation_step, "ratio": c.random_ratio, "area": c.completion_area}
            masks.append(condition_mask(kind, x.shape[1], x.shape[3], x.shape[4], rng, **how))
        return torch.from_numpy(np.stack(masks)).to(x)

    # what a person gets

    def predict(self, batch: Batch) -> Videos:
        """The clip with its masked part generated; without a mask, all of it. Known pixels come back unchanged."""
        x0 = self.encode(batch)
        mask = self.mask_of(batch, x0)
        video = self.decode(self.sample(x0, mask))
        shown = batch.get("mask")
        if shown is None or "video" not in batch or video.shape != batch["video"].shape:
            return Videos(video, mask if shown is None else shown)
        known = shown[:, :, None]
        return Videos(batch["video"] * (1 - known) + video * known, shown)

    def sample(
        self, x0: Tensor, mask: Tensor, sampler: str | None = None, steps: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Generate x0 [batch, frames, channels, h, w] where mask [batch, frames, h, w] is 1; the rest conditions it and stays.

        sampler: "ddpm", "ddim" or "dpm-solver"; steps: how many of the diffusion steps it takes (by default the Config's). Without masks
        (Config.conditioning) only the first frames can be known, as many as one likes; BadInput for any other mask.
        """
        c = self.config
        sampler, steps = sampler or c.sampler, min(steps or c.sampling_steps, c.diffusion_steps)
        if sampler not in SAMPLERS:
            raise UnknownName("sampler", sampler, SAMPLERS)
        noise = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)
        if c.conditioning == "mask":
            mask = mask[:, :, None]
            known = x0 * (1 - mask)
            x = self._denoise(lambda x, t: self.network(known + x * mask, t), noise, sampler, steps, generator)
            return known + x * mask
        out, counts = x0.clone(), self._known_of(mask)
        for count in sorted({*counts}):
            rows = torch.tensor([i for i, own in enumerate(counts) if own == count], device=x0.device)
            given = x0[rows, :count]
            network = lambda x, t, given=given, count=count: self.network(torch.cat([given, x], 1), t, count)  # noqa: E731
            if count < c.num_frames:
                out[rows, count:] = self._denoise(network, noise[rows, count:], sampler, steps, generator)
        return out

    def _denoise(self, network: Any, x: Tensor, sampler: str, steps: int, generator: torch.Generator | None) -> Tensor:
        """From noise x to a sample. network: (x_t, t) -> (prediction, values of the variance or None), each shaped as x."""
        clip = not self.config.latent_channels

        def said(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            prediction, values = network(x, t)
            return prediction.float(), None if values is None else values.float()

        if sampler == "dpm-solver":
            return self.diffusion.dpm_solver(said, x, steps)
        if sampler == "ddim":
            return self.diffusion.spaced(steps).ddim(said, x, self.config.eta, clip, generator)
        return self.diffusion.spaced(steps).ddpm(said, x, clip, generator)

    def _known_of(self, mask: Tensor) -> list[int]:
        """How many of the first frames each mask [batch, frames, h, w] gives. BadInput where it isn't whole frames, the first ones."""
        counts = (mask.flatten(2).amax(2) == 0).sum(1)
        first = torch.arange(mask.shape[1], device=mask.device) < counts[:, None]
        if not torch.equal(mask, (~first).to(mask)[:, :, None, None].expand_as(mask)):
            fix = 'predict from the first frames, or create the model with conditioning="mask"'
            raise BadInput("mask", expected="whole frames, the first ones known", got="another one", fix=fix)
        return counts.tolist()
