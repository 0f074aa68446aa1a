"""What every video generator shares: the batch it takes, the space it works in, its prediction, its checks.

A batch holds
    video   float32 [batch, frames, channels, height, width] in [0, 1]; what is to be generated is read by losses and scores only
    mask    float32 [batch, frames, height, width], 1 where pixels are to be generated, 0 where they are known (evaluation and
            prediction; training draws its own)
    latent  float32 [batch, frames, latent channels, h, w], in place of video, where a model works on latents that are at hand
    id      list[str]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Model, check_tensor
from formarium.tasks.video_generation.masks import temporal_mask


class Videos(NamedTuple):
    """video: float32 [batch, frames, channels, height, width] in [0, 1], known pixels as they came (of latents without a decoder: the
    latents). mask: float32 [batch, frames, height, width], 1 where pixels were generated."""

    video: Tensor
    mask: Tensor


class VideoGenerator(Model):
    """A generator of clips of a fixed number of square frames, in pixels or in the latents of an image autoencoder.

    Config has `num_frames`, `channels` and `frame_size` (of the frames a person sees), and `latent_channels` and `latent_factor` (0 and
    1: it works on pixels, scaled to [-1, 1]). A model of latents is given an autoencoder by `use_vae`.
    """

    task = "video-generation"
    channel_axes = (2, None)

    def __init__(self, config: Any):
        super().__init__(config)
        self.__dict__["vae"] = None  # no submodule: its weights are neither trained nor saved with ours
        self.vae_scale = 1.0
        self.preprocessing = self._own_preprocessing({})

    def adopt(self, card: Any, variant: str, preprocessing: Mapping[str, Any]) -> None:
        super().adopt(card, variant, self._own_preprocessing(preprocessing))

    def _own_preprocessing(self, given: Mapping[str, Any]) -> dict[str, Any]:
        c = self.config
        return {"condition": "prediction", **given, "size": c.frame_size, "num_frames": c.num_frames, "channels": c.channels}

    # pixels and latents

    @property
    def in_channels(self) -> int:
        """Channels of what the network sees."""
        return self.config.latent_channels or self.config.channels

    @property
    def input_size(self) -> int:
        """Side of what the network sees."""
        return self.config.frame_size // self.config.latent_factor

    def use_vae(self, vae: Any, scale: float = 0.18215) -> VideoGenerator:
        """Work on this autoencoder's latents; returns self.

        vae: any object with encode(float [n, channels, H, W] in [-1, 1]) -> [n, latent channels, h, w] and decode, its inverse; what
        diffusers' AutoencoderKL returns (a `latent_dist`, a `sample`) is understood. scale: latents are multiplied by it.
        """
        if not (hasattr(vae, "encode") and hasattr(vae, "decode")):
            raise BadInput("vae", expected="an object with encode and decode", got=type(vae).__name__)
        if not self.config.latent_channels:
            raise BadInput(
                "vae", expected="a model of latents (Config.latent_channels)", got=f"{self.variant or 'a model'}, which works on pixels"
            )
        self.__dict__["vae"], self.vae_scale = vae, scale
        return self

    def encode(self, batch: Batch) -> Tensor:
        """What the network sees of a batch, float [batch, frames, in_channels, h, w]."""
        if "latent" in batch:
            return batch["latent"]
        video = batch["video"]
        check_tensor("video", video, "batch frames channels height width", sizes={1: self.config.num_frames, 2: self.config.channels})
        x = video * 2 - 1
        if not self.config.latent_channels:
            return x
        if self.vae is None:
            raise BadInput("video", expected="latents, or an autoencoder to make them", got="pixels", fix="call model.use_vae(vae) first")
        with torch.no_grad():
            z = self.vae.encode(x.flatten(0, 1))
        z = getattr(z, "latent_dist", z)
        z = z.sample() if hasattr(z, "sample") and not isinstance(z, Tensor) else z
        return (z * self.vae_scale).unflatten(0, x.shape[:2])

    def decode(self, z: Tensor) -> Tensor:
        """Back to pixels in [0, 1]; latents stay as they are where there is no autoencoder."""
        if not self.config.latent_channels:
            return (z.clamp(-1, 1) + 1) / 2
        if self.vae is None:
            return z
        with torch.no_grad():
            x = self.vae.decode(z.flatten(0, 1) / self.vae_scale)
        x = x if isinstance(x, Tensor) else x.sample
        return ((x.clamp(-1, 1) + 1) / 2).unflatten(0, z.shape[:2])

    def mask_of(self, batch: Batch, z: Tensor) -> Tensor:
        """The batch's mask at the network's resolution, float [batch, frames, h, w]; all ones where it has none. A latent is generated if
        any of its pixels is."""
        mask = batch.get("mask")
        if mask is None:
            return z.new_ones(z.shape[0], z.shape[1], *z.shape[3:])
        check_tensor("mask", mask, "batch frames height width", sizes={0: z.shape[0], 1: z.shape[1]})
        factor = mask.shape[-1] // z.shape[-1]
        return mask if factor <= 1 else F.max_pool2d(mask, factor)

    # examples and checks

    def example(self, batch: int = 1, frames: int | None = None, size: int | None = None) -> tuple[Tensor, ...]:
        t, s = frames or self.config.num_frames, size or self.input_size
        return torch.randn(batch, t, self.in_channels, s, s, device=self.device), torch.arange(batch, device=self.device) * 37 % 1000

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        c = self.config
        return {"one frame more": self.example(1, c.num_frames + 1), "twice the size": self.example(1, size=2 * self.input_size)}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        """Discs that move to the right; the second half of the frames is to be generated."""
        c = self.config
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[: c.frame_size, : c.frame_size] / c.frame_size
        starts, heights = rng.uniform(0.1, 0.4, batch), rng.uniform(0.3, 0.7, batch)
        at = starts[:, None] + np.linspace(0, 0.5, c.num_frames)  # b t
        discs = ((x - at[..., None, None]) ** 2 + (y - heights[:, None, None, None]) ** 2 < 0.04).astype(np.float32)
        video = torch.from_numpy(np.repeat(discs[:, :, None], c.channels, 2)).to(self.device)
        mask = torch.from_numpy(temporal_mask("prediction", c.num_frames, c.frame_size, c.frame_size, rng)).to(self.device)
        out: dict[str, Any] = {"video": video, "mask": mask.expand(batch, -1, -1, -1), "id": [f"example {i}" for i in range(batch)]}
        if c.latent_channels and self.vae is None:
            out["latent"] = torch.from_numpy(
                rng.standard_normal((batch, c.num_frames, self.in_channels, *(self.input_size,) * 2), np.float32)
            )
        return out

    def check_input(self, x: Any, t: Any) -> None:
        c, side = self.config, self.input_size
        check_tensor("x", x, "batch frames channels height width", sizes={1: c.num_frames, 2: self.in_channels, 3: side, 4: side})
        check_tensor("t", t, "batch", sizes={0: x.shape[0]}, dtype=lambda d: d in (torch.int64, torch.int32))
