"""Restorers trained as Real-ESRGAN's are: first by the difference of pixels, then with a perceptual loss and a discriminator as well.

Stage "l1"    |made - truth|
Stage "gan"   restorer:       l1 + perceptual + 0.1 * BCE(D(made), real)
              discriminator:  BCE(D(truth), real) + BCE(D(made), made)

Each of the three may compare with the truth as it is or with the truth sharpened (unsharp masking), so that what is made is sharper.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Losses, Stage, Turn
from formarium.nn.filters import usm_sharpen
from formarium.nn.perceptual import PerceptualDistance, vgg19_perceptual
from formarium.nn.unet_discriminator import UNetDiscriminator
from formarium.tasks.image_restoration.model import ImageRestorer, check_scale

COMPARED = ("l1", "perceptual", "gan")


class AdversarialRestorer(ImageRestorer):
    """A restorer that has, where its config's `gan` is set, a discriminator and the second stage.

    Config has further `gan`, `discriminator_dim`, `sharpened` (of COMPARED), `l1_weight`, `perceptual_weight`, `gan_weight`, `vgg19` (the
    file with torchvision's weights, for the perceptual loss) and `gan_share` (of the steps). Subclasses call `add_discriminator` when
    the restorer itself is built; all its other parameters are the restorer's.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        unknown = [name for name in config.sharpened if name not in COMPARED]
        if unknown:
            raise BadInput("sharpened", expected=f"some of {', '.join(COMPARED)}", got=", ".join(unknown))
        self._perceptual: PerceptualDistance | None = None
        self._made: tuple[Tensor, Tensor] | None = None  # the batch's images, and what the restorer made of them in its last turn

    def add_discriminator(self) -> None:
        if self.config.gan:
            self.discriminator = UNetDiscriminator(self.config.in_channels, self.config.discriminator_dim)

    # how it trains ----------------------------------------------------------------------------------------------------

    def training_stages(self) -> Sequence[Stage]:
        """Raises BadInput before the first step where the second stage would have no weights for its perceptual loss."""
        if not self.config.gan:
            return super().training_stages()
        share = self.config.gan_share
        if not 0 < share < 1:
            raise BadInput("gan_share", expected="a share between 0 and 1", got=str(share))
        self.perceptual_distance()
        own = self.restorer_parameters()
        turns = (Turn("restorer_loss", own), Turn("discriminator_loss", ("discriminator.*",)))
        return (Stage("l1", (Turn("loss", own),), 1 - share), Stage("gan", turns, share, prepare="begin_gan"))

    def restorer_parameters(self) -> tuple[str, ...]:
        """Globs over the names of everything but the discriminator."""
        inside = [f"{name}.*" for name, _ in self.named_children() if name != "discriminator"]
        return (*(name for name, _ in self.named_parameters(recurse=False)), *inside)

    def begin_gan(self) -> None:
        if self.perceptual_distance() is None:
            name = self.variant or type(self).__name__
            warnings.warn(f"{name}: the GAN stage is trained without the perceptual loss (perceptual_weight = 0)", stacklevel=2)

    def perceptual_distance(self) -> PerceptualDistance | None:
        """VGG-19 with the weights of the file that `vgg19` names; None where the perceptual loss counts nothing. Read once."""
        c = self.config
        if not c.perceptual_weight:
            return None
        if self._perceptual is None:
            if not c.vgg19:
                raise BadInput(
                    "vgg19",
                    expected="a file with torchvision's ImageNet weights of vgg19, for the perceptual loss",
                    got="none",
                    fix='create(..., vgg19="vgg19-dcbb9e9d.pth"), or perceptual_weight=0 to train without',
                )
            self._perceptual = vgg19_perceptual(c.vgg19)
        return self._perceptual

    # what it learns from ----------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Losses:
        """The mean absolute difference (L1), over pixels and channels."""
        check_scale(batch["image"], batch["target"], self.config.upscale)
        l1 = F.l1_loss(self.forward_batch(batch).float(), self.truths(batch)["l1"])
        return Losses(l1, {"l1": l1})

    def restorer_loss(self, batch: Batch) -> Losses:
        """L1, perceptual and GAN loss, weighted; terms before their weights."""
        check_scale(batch["image"], batch["target"], self.config.upscale)
        c, truth = self.config, self.truths(batch)
        made = self.forward_batch(batch).float()
        self._made = (batch["image"], made.detach())
        terms = {"l1": F.l1_loss(made, truth["l1"]), "gan": real_loss(self.discriminator(made))}
        total = c.l1_weight * terms["l1"] + c.gan_weight * terms["gan"]
        if distance := self.perceptual_distance():
            terms["perceptual"] = distance(made, truth["perceptual"]).float()
            total = total + c.perceptual_weight * terms["perceptual"]
        return Losses(total, terms)

    def discriminator_loss(self, batch: Batch) -> Losses:
        """Binary cross entropy of the true image, pixel by pixel, plus that of the made one. Terms also hold the mean logits."""
        real = self.discriminator(self.truths(batch)["gan"])
        made = self.discriminator(self.made(batch))
        terms = {"real": real_loss(real), "made": made_loss(made)}
        return Losses(terms["real"] + terms["made"], {**terms, "logit_real": real.mean(), "logit_made": made.mean()})

    def made(self, batch: Batch) -> Tensor:
        """What the restorer made of this batch in its own turn just before (with the weights it had then), else made now; no gradient."""
        kept, self._made = self._made, None
        if kept is not None and kept[0] is batch["image"]:
            return kept[1]
        with torch.no_grad():
            return self.forward_batch(batch).float()

    def truths(self, batch: Batch) -> dict[str, Tensor]:
        """The clean images that each loss compares with, as they are or sharpened."""
        wanted, target = self.config.sharpened, batch["target"]
        sharp = usm_sharpen(target.float()) if wanted else target
        return {name: sharp if name in wanted else target for name in COMPARED}


def real_loss(logits: Tensor) -> Tensor:
    """Binary cross entropy of being real, the mean over pixels."""
    return F.softplus(-logits.float()).mean()


def made_loss(logits: Tensor) -> Tensor:
    """Binary cross entropy of being made, the mean over pixels."""
    return F.softplus(logits.float()).mean()
