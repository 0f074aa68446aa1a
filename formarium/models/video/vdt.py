"""VDT, a video diffusion transformer (Lu et al., ICLR 2024, arXiv 2305.13311).

DiT's blocks, each with a temporal attention before the spatial one. Every frame is cut into patches; temporal attention mixes a patch
with the same patch of the other frames, spatial attention the patches of a frame. One network learns every way of completing a clip:
it sees x_0 (1 - M) + x_t M, known pixels clean and the others noisy, and predicts the noise where M = 1 (section 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput, UnknownName
from formarium.features import Tap
from formarium.model import Batch, Losses
from formarium.nn.attention import SelfAttention
from formarium.nn.diffusion import GaussianDiffusion, TimestepEmbedder, beta_schedule, sincos_grid, sincos_table
from formarium.nn.mlp import gelu_between
from formarium.tasks.video_generation.masks import condition_mask
from formarium.tasks.video_generation.model import VideoGenerator, Videos

SAMPLERS = ("ddpm", "ddim", "dpm-solver")
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


class Block(nn.Module):
    """Temporal attention, then DiT's block of spatial attention and MLP, both under adaLN-Zero, alike in all frames.

    x: float [batch, frames, patches, dim]; condition: float [batch, dim]. The tap reads x between attention and MLP.
    """

    def __init__(self, c: VDT.Config):
        super().__init__()
        dim, hidden = c.hidden_size, int(c.hidden_size * c.mlp_ratio)
        if c.temporal:
            self.temporal = TemporalAttention(dim, c.num_heads)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = SelfAttention(dim, c.num_heads)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.tap = Tap()

    def forward(self, x: Tensor, condition: Tensor, grid: tuple[int, int, int]) -> Tensor:
        b, t, n, d = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None, None].chunk(6, -1)
        if hasattr(self, "temporal"):
            x = x + self.temporal(x)
        y = modulate(self.norm(x), shift1, scale1)
        x = x + gate1 * self.attention(y.reshape(b * t, n, d)).view(b, t, n, d)
        x = self.tap(x.flatten(1, 2), grid=grid).view(b, t, n, d)
        y = gelu_between(modulate(self.norm(x), shift2, scale2), self.fc1, self.fc2, "tanh")
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

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x float [batch, frames, channels, h, w] (noisy where it is to be generated) and t int64 [batch], the diffusion step, to
        the noise (or what Config.prediction says) and, where the variance is learned, its values: [batch, frames, channels (* 2), h, w]."""
        c, (frames, h, w), b = self.config, self.grid, x.shape[0]
        x = self.patch_embed(x.flatten(0, 1)).flatten(2).transpose(1, 2) + self.positions  # (b t) n d
        x = x.view(b, frames, h * w, c.hidden_size)
        if c.temporal:
            x = x + self.times[:, :, None]
        x = self.tokens(x.flatten(1, 2), grid=self.grid).view(b, frames, h * w, c.hidden_size)
        condition = self.step_embed(t) + self.label_embed(self._labels(t))
        for block in self.blocks:
            x = block(x, condition, self.grid)
        shift, scale = self.modulation(F.silu(condition))[:, None, None].chunk(2, -1)
        x = self.features(modulate(self.norm(x), shift, scale).flatten(1, 2), grid=self.grid)
        p = c.patch_size
        x = self.head(x).view(b, frames, h, w, p, p, self.out_channels).permute(0, 1, 6, 2, 4, 3, 5)
        return x.reshape(b, frames, self.out_channels, h * p, w * p)

    def _labels(self, t: Tensor) -> Tensor:
        zeros = torch.zeros_like(t)
        if not self.training or not self.config.class_dropout:
            return zeros
        return torch.where(torch.rand(t.shape, device=t.device) < self.config.class_dropout, self.config.num_classes, zeros)

    def network(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """(prediction, values of the variance or None), each shaped as x."""
        out = self(x, t)
        return (out[:, :, : self.in_channels], out[:, :, self.in_channels :]) if self.config.learn_sigma else (out, None)

    def forward_batch(self, batch: Batch) -> Tensor:
        """The network on a batch with its unknown part at the middle of the noise."""
        x0 = self.encode(batch)
        mask = self.mask_of(batch, x0)[:, :, None]
        t = torch.full((len(x0),), self.config.diffusion_steps // 2, device=x0.device)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
        return self(x0 * (1 - mask) + self.diffusion.q_sample(x0, t, noise) * mask, t)

    # what it learns

    def loss(self, batch: Batch) -> Losses:
        """Masked denoising under a mask drawn for each clip, at a step drawn for each; the variance's bound, where it is learned."""
        x0 = self.encode(batch)
        t = torch.randint(self.config.diffusion_steps, (len(x0),), device=x0.device)
        terms = self.masked_losses(x0, t, torch.randn_like(x0), self.draw_masks(x0))
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

        sampler: "ddpm", "ddim" or "dpm-solver"; steps: how many of the diffusion steps it takes (by default the Config's).
        """
        c = self.config
        sampler, steps, mask = sampler or c.sampler, min(steps or c.sampling_steps, c.diffusion_steps), mask[:, :, None]
        if sampler not in SAMPLERS:
            raise UnknownName("sampler", sampler, SAMPLERS)
        known, clip = x0 * (1 - mask), not c.latent_channels

        def network(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            said, values = self.network(known + x * mask, t)
            return said.float(), None if values is None else values.float()

        x = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)
        if sampler == "dpm-solver":
            x = self.diffusion.dpm_solver(network, x, steps)
        elif sampler == "ddim":
            x = self.diffusion.spaced(steps).ddim(network, x, c.eta, clip, generator)
        else:
            x = self.diffusion.spaced(steps).ddpm(network, x, clip, generator)
        return known + x * mask
