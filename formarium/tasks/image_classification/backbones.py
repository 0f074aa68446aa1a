"""Any image backbone as the foot of a dense predictor, by name: its pyramid of maps, and how many channels each has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.catalogue import create, make_config, model_class, resolve
from formarium.errors import BadInput
from formarium.model import evaluating
from formarium.tasks.image_classification.model import ImageClassifier
from formarium.tasks.image_classification.trunks import TRUNKS


def make_backbone(name: str, config: Mapping[str, Any] | None = None) -> ImageClassifier:
    """A fresh backbone of which `pyramid(image)` gives maps, fine to coarse, without a head where it can do without.

    name: a variant of the catalogue, or "vit" or "swin". config: what differs from that variant's. Raises UnknownName, BadInput.
    """
    own = dict(config or {})
    if name in TRUNKS:
        cls = TRUNKS[name]
        return cls(make_config(cls.Config, {"dense": True, **own}))
    card, _ = resolve(name)
    if card.kind != "model" or card.task != "image-classification":
        raise BadInput(name, expected="an image backbone", got=f"a {card.kind} for {card.task}")
    dense = {"dense": True} if "dense" in model_class(card).Config.__dataclass_fields__ else {}
    made: Any = create(name, **dense, **own)
    if not dense:  # what only classifies isn't on the way to the maps
        for parameter in (p for n, p in made.named_parameters() if n.startswith("head")):
            parameter.requires_grad_(False)
    return made


@torch.no_grad()
def pyramid_channels(backbone: ImageClassifier, side: int = 64) -> tuple[int, ...]:
    """The channels of each of the pyramid's maps, found by a forward on zeros (for nothing on the meta device)."""
    image = torch.zeros(1, backbone.config.in_channels, side, side, device=next(backbone.parameters()).device)
    with evaluating(backbone):
        return tuple(x.shape[1] for x in backbone.pyramid(image))


def padded_to(image: Tensor, multiple: int) -> Tensor:
    """Zeros at the right and below, up to sides that are multiples of a number. float [batch, channels, height, width]."""
    h, w = image.shape[2:]
    return F.pad(image, (0, -w % multiple, 0, -h % multiple))
