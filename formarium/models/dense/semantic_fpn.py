"""Semantic FPN (Kirillov et al., CVPR 2019, arXiv 1901.02446) and UPerNet (Xiao et al., ECCV 2018, arXiv 1807.10221) on any image backbone.

The two heads by which backbones' papers report semantic segmentation. Semantic FPN: a feature pyramid whose levels are convolved up to the
finest one's size and summed. UPerNet: pyramid pooling on the coarsest map, a top-down pyramid, all levels joined; a small fully
convolutional head on a middle map learns beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from formarium.errors import BadInput, UnknownName
from formarium.features import Tap
from formarium.model import Batch, Losses
from formarium.nn.fpn import FPN, ConvNormAct, SemanticFPNHead, UPerHead, resized
from formarium.tasks.image_classification.backbones import make_backbone, padded_to, pyramid_channels
from formarium.tasks.semantic_segmentation.model import Segmenter, pixel_cross_entropy

HEADS = ("fpn", "uper")


class SemanticFPN(Segmenter):
    @dataclass(frozen=True)
    class Config:
        backbone: str = "pvt_tiny"  # a variant of the catalogue, "vit" or "swin"
        backbone_config: Mapping[str, Any] = field(default_factory=dict)  # what differs from that variant's config
        head: str = "fpn"  # or "uper"
        dim: int = 256  # channels of the neck (fpn) or of all of UPerNet's levels
        hidden: int = 128  # channels of Semantic FPN's decoder
        dropout: float = 0.1
        auxiliary: float = 0.0  # weight of the loss of a convolutional head on the last map but one (UPerNet: 0.4)
        norm: str = "group"  # as the paper; "batch" as the released checkpoints of MMSegmentation's family (no training on single pictures)
        multiple: int = 32  # sides are padded to multiples of this
        num_classes: int = 150

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.head not in HEADS:
            raise UnknownName("head", c.head, HEADS)
        self.backbone = make_backbone(c.backbone, c.backbone_config)
        channels = pyramid_channels(self.backbone)
        self.neck = FPN(channels, c.dim) if c.head == "fpn" else nn.Identity()
        self.decoder = (
            SemanticFPNHead(len(channels), c.dim, c.hidden, c.num_classes, c.dropout, c.norm)
            if c.head == "fpn"
            else UPerHead(channels, c.dim, c.num_classes, c.dropout, c.norm)
        )
        self.features = Tap()
        if c.auxiliary:
            middle = channels[max(0, len(channels) - 2)]
            self.auxiliary = nn.Sequential(
                ConvNormAct(middle, c.dim, norm=c.norm), nn.Dropout2d(c.dropout), nn.Conv2d(c.dim, c.num_classes, 1)
            )

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [batch, 3, height, width], any size, to logits [batch, classes, height, width]."""
        padded = padded_to(image, self.config.multiple)
        return self._enlarged(self._decoded(self.backbone.pyramid(padded)), padded, image)

    def _decoded(self, maps: tuple[Tensor, ...]) -> Tensor:
        x = self.decoder.fuse(self.neck(maps))
        grid = (x.shape[2], x.shape[3])
        x = self.features(x.flatten(2).transpose(1, 2), grid=grid).transpose(1, 2).unflatten(2, grid)
        return self.decoder.classify(self.decoder.dropout(x))

    @staticmethod
    def _enlarged(logits: Tensor, padded: Tensor, image: Tensor) -> Tensor:
        return resized(logits, padded)[..., : image.shape[2], : image.shape[3]]

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy of the pixels that have a class, and of the auxiliary head's."""
        image = self.normalise(batch["image"])
        self.check_input(image)
        padded = padded_to(image, self.config.multiple)
        maps = self.backbone.pyramid(padded)
        own = pixel_cross_entropy(self._enlarged(self._decoded(maps), padded, image), batch["label"])
        if not self.config.auxiliary:
            return Losses(own, {"cross_entropy": own})
        aside = pixel_cross_entropy(self._enlarged(self.auxiliary(maps[max(0, len(maps) - 2)]), padded, image), batch["label"])
        return Losses(own + self.config.auxiliary * aside, {"cross_entropy": own, "auxiliary": aside})

    def no_weight_decay(self) -> set[str]:
        return {f"backbone.{g}" for g in self.backbone.no_weight_decay()}

    def load_backbone(self, path: Any, skip: tuple[str, ...] = ("head*",)) -> SemanticFPN:
        """Load a released backbone checkpoint of its authors into the backbone; returns self. skip: globs over the backbone's parameters to
        leave as they are. Raises BadCheckpoint."""
        if not hasattr(self.backbone, "card") or self.backbone.card is None:
            raise BadInput("backbone", expected="a variant of the catalogue", got=self.config.backbone)
        self.backbone.load_authors(path, skip=skip)
        return self
