"""GenConViT (Deressa et al., 2023, arXiv 2307.07036): deepfakes, told from a frame and what an autoencoder makes of it.

Two networks, trained apart, that judge a frame together with its own reconstruction, by one ConvNeXt for both:

    A  r = decoder(encoder(x)),        logits = MLP(GELU [f(r), f(x)])                 loss: cross entropy
    B  z = mu + eps * deviation,  r = decoder(z),  logits = MLP(ReLU [f(x), f(r)])     loss: cross entropy + |resize(r) - x|^2

f is ConvNeXt, with Swin as its "hybrid embedding" beside it: Swin's answer goes through a 1x1 convolution to tokens. In the released code
ConvNeXt never looks at them (`embedding` "released"); "fused" adds them to its pooled features. A video's score is the mean over all its
frames and both networks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.model import Batch, Losses, Stage, Turn
from formarium.nn.convnext import ConvNeXt, interleave, upsampled
from formarium.tasks.deepfake_detection.model import DeepfakeDetector
from formarium.tasks.image_classification.trunks import Swin


class HybridBackbone(nn.Module):
    """ConvNeXt with Swin beside it. forward: images [batch * views, 3, h, w] to answers [batch * views, outputs]."""

    def __init__(self, c: GenConViT.Config):
        super().__init__()
        self.fused = c.embedding == "fused"
        self.convnext = ConvNeXt(c.dims, c.depths, c.outputs, c.in_channels, c.layer_scale, c.init_std)
        self.swin: Swin | None = None
        if c.embedder:
            sizes = {"dim": c.swin_dim, "depths": c.swin_depths, "heads": c.swin_heads, "window": c.swin_window, "patch_size": 4}
            self.swin = Swin(Swin.Config(image_size=c.image_size, in_channels=c.in_channels, num_classes=c.outputs, **sizes))
            self.embed = nn.Conv2d(c.outputs, c.embed_dim, 1)

    def forward(self, image: Tensor, views: int = 1) -> Tensor:
        return self.convnext(image, views, self.tokens(image) if self.fused else None)

    def tokens(self, image: Tensor) -> Tensor:
        """The hybrid embedding, one token an image: float [batch, embed_dim]."""
        assert self.swin is not None
        return self.embed(self.swin(image)[..., None, None]).flatten(1)

    def both(self, first: Tensor, second: Tensor) -> Tensor:
        """Answers to two images a sample, side by side: [batch, 2 outputs]. Of one size, and without Swin, they go through together."""
        if first.shape == second.shape and not self.fused:
            return self(interleave(first, second), 2).view(len(first), -1)
        return torch.cat([self(first), self(second)], 1)


class Autoencoding(nn.Module):
    """Network A. x: normalised frames [batch, 3, h, w], sides multiples of 32. Returns logits [batch, 2]."""

    def __init__(self, c: GenConViT.Config):
        super().__init__()
        widths = (c.in_channels, *c.widths)
        self.encoder = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 3, padding=1) for i in range(5))
        self.decoder = nn.ModuleList(nn.ConvTranspose2d(widths[i + 1], widths[i], 2, 2) for i in reversed(range(5)))
        self.backbone = HybridBackbone(c)
        self.fc, self.fc2 = nn.Linear(2 * c.outputs, c.outputs // 2), nn.Linear(c.outputs // 2, 2)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The image that the autoencoder makes of x, nowhere below zero: [batch, 3, h, w]."""
        for layer in self.encoder:
            x = F.max_pool2d(F.relu(layer(x)), 2)
        for layer in self.decoder:
            x = F.relu(layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        answers = self.backbone.both(self.reconstruct(x), x)
        return self.fc2(F.gelu(self.fc(F.gelu(answers))))


class Variational(nn.Module):
    """Network B. x: normalised frames [batch, 3, s, s], s the side it was built for. Returns logits [batch, 2] and the reconstruction
    [batch, 3, s / 2, s / 2]. encoder.fc1, encoder.fc2 and fc3 are in the released weights and touch nothing."""

    def __init__(self, c: GenConViT.Config):
        super().__init__()
        self.side, self.deviation, self.sample_always = c.image_size // 32, c.deviation, c.sample_in_eval
        widths, top = (c.in_channels, *c.widths[:4]), c.widths[4]
        flat, latent = widths[4] * (2 * self.side) ** 2, top * self.side**2
        self.encoder = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 3, 2, 1) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.unused = nn.ModuleDict({"fc1": nn.Linear(flat, 256), "fc2": nn.Linear(256, 128)})
        self.mu, self.variance = nn.Linear(flat, latent), nn.Linear(flat, latent)
        back = (top, widths[3], widths[2], widths[1], widths[0])
        self.decoder = nn.ModuleList(nn.ConvTranspose2d(back[i], back[i + 1], 2, 2) for i in range(4))
        self.backbone = HybridBackbone(c)
        self.fc, self.fc2 = nn.Linear(2 * c.outputs, c.outputs // 2), nn.Linear(c.outputs // 2, 2)
        self.unused["fc3"] = nn.Linear(c.outputs, c.outputs // 2)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of z, float [batch, latent] each."""
        for conv, norm in zip(self.encoder, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.01)
        flat = x.flatten(1)
        return self.mu(flat), self.variance(flat)

    def decode(self, z: Tensor) -> Tensor:
        x = z.unflatten(1, (-1, self.side, self.side))
        for layer in self.decoder:
            x = F.leaky_relu(layer(x), 0.01)
        return x

    def draw(self, mu: Tensor, variance: Tensor, eps: Tensor | None = None) -> Tensor:
        """z = mu + eps * exp(half of mu, as released, or of the log-variance). Without eps: drawn in training, 0 in evaluation."""
        if eps is None:
            if not (self.training or self.sample_always):
                return mu
            eps = torch.randn_like(mu)
        return mu + eps * torch.exp(0.5 * (mu if self.deviation == "mu" else variance))

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """logits [batch, 2], reconstruction, and the divergence of each z from a standard normal [batch]."""
        mu, variance = self.encode(x)
        reconstruction = self.decode(self.draw(mu, variance, eps))
        second = self.backbone(reconstruction)  # smaller than x, so they can't go together
        answers = torch.cat([self.backbone(x), second], 1)
        divergence = -0.5 * (1 + variance - mu.square() - variance.exp()).sum(1)
        return self.fc2(F.relu(self.fc(F.relu(answers)))), reconstruction, divergence


class GenConViT(DeepfakeDetector):
    @dataclass(frozen=True)
    class Config:
        networks: str = "both"  # "ed" (A), "vae" (B) or "both"
        dims: tuple[int, ...] = (96, 192, 384, 768)  # ConvNeXt's
        depths: tuple[int, ...] = (3, 3, 9, 3)
        layer_scale: float = 1e-6
        init_std: float = 0.02  # of its weights; narrow networks need more, or their GELUs stay in their linear part
        embedder: bool = True  # whether Swin is there
        swin_dim: int = 96
        swin_depths: tuple[int, ...] = (2, 2, 6, 2)
        swin_heads: tuple[int, ...] = (3, 6, 12, 24)
        swin_window: int = 7
        embedding: str = "released"  # Swin has no effect; "fused": its token is added to ConvNeXt's pooled features
        embed_dim: int = 768
        outputs: int = 1000  # of ConvNeXt and Swin, ImageNet's classes
        widths: tuple[int, ...] = (16, 32, 64, 128, 256)  # of the autoencoders
        deviation: str = "mu"  # of z: exp(mu / 2) as released, or exp(log-variance / 2) with "variance"
        sample_in_eval: bool = False  # draw z in evaluation too, as the released code does: then scores differ from run to run
        reconstruction_weight: float = 1.0
        divergence_weight: float = 0.0  # the released code computes the term (halved) and leaves it out
        image_size: int = 224
        in_channels: int = 3

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.networks not in ("ed", "vae", "both"):
            raise BadInput("GenConViT's networks", expected='"ed", "vae" or "both"', got=repr(c.networks))
        if c.embedding not in ("released", "fused") or c.deviation not in ("mu", "variance"):
            raise BadInput(
                "GenConViT's embedding and deviation",
                expected='"released" or "fused", "mu" or "variance"',
                got=f"{c.embedding!r}, {c.deviation!r}",
            )
        if c.embedding == "fused" and (not c.embedder or c.embed_dim != c.dims[-1]):
            raise BadInput("GenConViT's fused embedding", expected=f"an embedder with embed_dim = {c.dims[-1]}", got=f"{c.embed_dim}")
        if c.image_size % 32:
            raise BadInput("GenConViT's image_size", expected="a multiple of 32", got=str(c.image_size))
        self.ed = Autoencoding(c) if c.networks != "vae" else None
        self.vae = Variational(c) if c.networks != "ed" else None

    def forward(self, image: Tensor) -> Tensor:
        """Normalised frames [frames, 3, height, width] to logits [frames, networks, 2] (fake, real), A before B."""
        said = []
        if self.ed is not None:
            said.append(self.ed(image))
        if self.vae is not None:
            said.append(self.vae(image)[0])
        return torch.stack(said, 1)

    def loss(self, batch: Batch) -> Losses:
        """Both networks' losses, added; they share no weight."""
        parts = [f(batch) for f, there in ((self.ed_loss, self.ed), (self.vae_loss, self.vae)) if there is not None]
        terms = {k: v for p in parts for k, v in p.terms.items()}
        return Losses(torch.stack([p.total for p in parts]).sum(), terms)

    def ed_loss(self, batch: Batch) -> Losses:
        """Network A: cross entropy of every frame with its video's label."""
        assert self.ed is not None
        frames, label = self._frames(batch)
        loss = F.cross_entropy(self.ed(frames).float(), label)
        return Losses(loss, {"ed_cross_entropy": loss})

    def vae_loss(self, batch: Batch) -> Losses:
        """Network B: cross entropy, the reconstruction's squared error at the frame's size, and the divergence where it is weighted."""
        assert self.vae is not None
        c = self.config
        frames, label = self._frames(batch)
        logits, reconstruction, divergence = self.vae(frames)
        terms = {
            "vae_cross_entropy": F.cross_entropy(logits.float(), label),
            "reconstruction": F.mse_loss(upsampled(reconstruction.float(), frames.shape[2:]), frames.float()),
            "divergence": 0.5 * divergence.float().mean(),
        }
        total = terms["vae_cross_entropy"] + c.reconstruction_weight * terms["reconstruction"]
        if c.divergence_weight:
            total = total + c.divergence_weight * terms["divergence"]
        return Losses(total, terms)

    def _frames(self, batch: Batch) -> tuple[Tensor, Tensor]:
        frames = batch["frames"]
        return self.normalise(frames.flatten(0, 1)), batch["label"].repeat_interleave(frames.shape[1])

    def training_stages(self) -> tuple[Stage, ...]:
        """The networks are trained one after the other."""
        stages = []
        if self.ed is not None:
            stages.append(Stage("autoencoder network", (Turn("ed_loss", ("ed.*",)),)))
        if self.vae is not None:
            stages.append(Stage("variational network", (Turn("vae_loss", ("vae.*",)),)))
        return tuple(stages)

    def check_size(self, height: int, width: int) -> None:
        side = self.config.image_size
        if self.vae is not None and (height, width) != (side, side):
            raise BadInput("frame size", expected=f"{side}x{side}", got=f"{height}x{width}", fix="resize the frames")
        if height % 32 or width % 32:
            raise BadInput("frame size", expected="multiples of 32", got=f"{height}x{width}", fix="resize the frames")
