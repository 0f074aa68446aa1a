"""What methods share that make a new image classifier out of any other: the trunk inside, saved and created with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from formarium.catalogue import create, make_config, resolve
from formarium.errors import BadInput
from formarium.features import Feature, Features, taps, watching
from formarium.model import Batch, Model, evaluating
from formarium.tasks.image_classification.model import ImageClassifier
from formarium.tasks.image_classification.trunks import TRUNKS


class Wrapped(ImageClassifier):
    """A classifier made of another one, its `trunk`. Subclasses' Configs start from `Wrapped.Config`; their constructors take
    (config, trunk=None), the trunk being made from the config where none is given."""

    @dataclass(frozen=True)
    class Config:
        trunk: str = "vit"  # "vit", "swin" or a variant's name of the catalogue
        trunk_config: Mapping[str, Any] = field(default_factory=dict)  # what differs from that trunk's config
        in_channels: int = 3
        num_classes: int = 1000
        dense: bool = False

    def __init__(self, config: Any, trunk: ImageClassifier | None = None):
        made = trunk if trunk is not None else make_trunk(config)
        object.__setattr__(self, "_size", made.image_size)  # asked for by the base class before there are sub-modules
        super().__init__(config)
        self.trunk = made

    def forward(self, image: Tensor) -> Any:
        """Normalised image [batch, channels, height, width] to the trunk's answer."""
        return self.trunk(image)

    @property
    def image_size(self) -> tuple[int, int]:
        return self._size

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.trunk.pyramid(image)

    def check_size(self, height: int, width: int) -> None:
        self.trunk.check_size(height, width)

    def no_weight_decay(self) -> set[str]:
        return {f"trunk.{g}" for g in self.trunk.no_weight_decay()}

    def after_step(self, step: int, steps: int) -> None:
        self.trunk.after_step(step, steps)


def why_not(model: Model) -> str:
    """Why this is no image classifier that a method could wrap, or ""."""
    if not isinstance(model, ImageClassifier) or getattr(model.config, "dense", False):
        return "it is no image classifier"
    if not (model.variant or type(model) in TRUNKS.values()):
        return "it is of no variant of the catalogue, so that it couldn't be made again"
    return f"it is one of {type(model).__name__} already, made from a classifier" if isinstance(model, Wrapped) else ""


def make_trunk(config: Any) -> ImageClassifier:
    """The classifier that a Wrapped's config names, freshly initialised."""
    own = {**config.trunk_config, "num_classes": config.num_classes, "in_channels": config.in_channels}
    if config.trunk in TRUNKS:
        cls = TRUNKS[config.trunk]
        return cls(make_config(cls.Config, own))
    model: Any = create(config.trunk, **own)
    return model


def trunk_fields(model: ImageClassifier) -> dict[str, Any]:
    """The fields of a Wrapped's config that make this model again."""
    kind = next((k for k, cls in TRUNKS.items() if type(model) is cls), model.variant)
    own = {k: v for k, v in model.config_dict().items() if k not in ("num_classes", "in_channels")}
    return {"trunk": kind, "trunk_config": own, "num_classes": model.config.num_classes, "in_channels": model.config.in_channels}


M = TypeVar("M", bound=Wrapped)


def finish(made: M, slug: str, model: ImageClassifier) -> M:
    """A Wrapped made of `model` takes over its device, mode, preprocessing and class names, and the card of the method `slug`."""
    card, _ = resolve(slug)
    made.to(model.device)
    made.adopt(card, f"{slug}_on_{model.variant or trunk_fields(model)['trunk']}", model.preprocessing)
    made.names = [*model.names]
    return made.train(model.training)


@torch.no_grad()
def glance(trunk: ImageClassifier, places: Sequence[str]) -> list[Feature | None]:
    """What a forward on zeros passes at each of some taps, for its shape, grid and prefix, None where nothing does; works on the meta
    device, too."""
    found = Features()
    read = {name: tap for name, tap in taps(trunk, "*").items() if name in places}
    with evaluating(trunk), watching(trunk, dict.fromkeys(read), found, read, {}):
        nn.Module.__call__(trunk, torch.zeros(1, trunk.config.in_channels, *trunk.image_size, device=trunk.device))
    return [found.get(name) for name in places]


def shapes(trunk: ImageClassifier, places: Sequence[str]) -> list[Feature]:
    """The same of taps that all must pass tokens on a grid of two dimensions. Raises BadInput for others."""
    out: list[Feature] = []
    for name, feature in zip(places, glance(trunk, places), strict=True):
        if feature is None or feature.grid is None or len(feature.grid) != 2:
            raise BadInput(f"tap {name}", expected="tokens on a grid of two dimensions", got="others" if feature else "none in a forward")
        out.append(feature)
    return out


def target(batch: Batch) -> Tensor:
    """What a classifier learns from: soft targets where mixing made them, else labels."""
    return batch["target"] if "target" in batch else batch["label"]
