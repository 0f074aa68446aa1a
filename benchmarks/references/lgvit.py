"""LGViT on ViT and DeiT beside github.com/lostsword/LGViT: all exits, early exits, and a step of either stage."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import formarium
from formarium.authors import load_state
from references import TIMM, Pair, calling, importing, step

REPOSITORY = "lostsword/LGViT"


class Base(nn.Module):
    """transformers' PreTrainedModel, as much as is asked of it."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def post_init(self) -> None:
        pass

    def get_head_mask(self, mask: Any, layers: int) -> list[None]:
        return [None] * layers


def passing(*a: Any, **k: Any) -> Any:
    return lambda fn: fn


DOCS = ("add_code_sample_docstrings", "add_start_docstrings", "add_start_docstrings_to_model_forward", "replace_return_docstrings")
STUBS: dict[str, Any] = {
    "transformers__modeling_utils": {"PreTrainedModel": Base},
    "transformers__pytorch_utils": {},
    "transformers__onnx": {},
    "transformers__utils": {**dict.fromkeys(DOCS, passing), "logging": mock.MagicMock()},
}


def pairs(clone: Path) -> Iterator[Pair]:
    import transformers.activations
    import transformers.configuration_utils
    import transformers.modeling_outputs  # noqa: F401 (before their neighbours are stood in for)

    folder = clone / "models"
    packages = {"models": {"__path__": [str(folder)]}, "models__deit_highway": {"__path__": [str(folder / "deit_highway")]}}
    with (
        importing(clone, folder / "deit_highway", **TIMM, **STUBS, **packages),
        mock.patch.object(collections, "Iterable", collections.abc.Iterable, create=True),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        import modeling_highway_deit as authors

        first = authors.DeiTHighwayForImageClassification(how("ViT", "alternating_weighted"))
        second = authors.DeiTHighwayForImageClassification_distillation(how("DeiT", "distillation_LGViT"))
    ours, frozen = same("lgvit_vit_base", first), same("lgvit_deit_base", second)
    image, label = torch.randn(2, 3, 224, 224), torch.tensor([3, 7])
    yield Pair(
        "lgvit_vit_base, all exits, batch 2", "forward", calling(ours, lambda: ours(image)), calling(first, lambda: raw(first, image))
    )
    at = sorted(float(x.softmax(-1).max()) for x in calling(ours, lambda: ours(image[:1]))().exits)[4]  # the fifth surest exit and up
    ours.threshold = at - 1e-4
    first.deit.encoder.early_exit_threshold = [at - 1e-4] * 8
    yield Pair("lgvit_vit_base, 1 image, early exit", "forward", calling(ours, lambda: ours.answer(image[:1])),
               calling(first, lambda: first(image[:1])))  # fmt: skip
    batch = {"image": image, "label": label}

    def together() -> Tensor:
        ours.steps.fill_(1)  # every other step trains all exits
        return ours.loss(batch).total

    def theirs() -> Tensor:
        first.stage = 1
        return first(image, labels=label)[0]

    yield Pair("lgvit_vit_base, first stage, batch 2", "train", step(ours, together), step(first, theirs))
    frozen.freeze_trunk()
    yield Pair(
        "lgvit_deit_base, second stage, batch 2",
        "train",
        step(frozen.exits, lambda: frozen.distillation(batch).total),
        step(second.deit.encoder.highway, lambda: second.train()(image, labels=label)[0]),
    )


def how(backbone: str, strategy: str) -> SimpleNamespace:
    """The released sizes, as their configuration class would hold them."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "num_labels": 100}
    image = {"image_size": 224, "patch_size": 16, "num_channels": 3, "qkv_bias": True, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    exits = {"num_early_exits": 8, "position_exits": "[4, 5, 6, 7, 8, 9, 10, 11]", "highway_type": "LGViT", "encoder_ensemble": False}
    losses = {"loss_coefficient": 0.3, "homo_coefficient": 0.01, "hete_coefficient": 0.01, "problem_type": None}
    rest = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "chunk_size_feed_forward": 0, "use_return_dict": True}
    never = {"exit_strategy": "confidence", "threshold": 2.0, "output_attentions": False, "output_hidden_states": False}
    losses |= {"homo_loss_coefficient": 0.01, "hete_loss_coefficient": 0.01}
    return SimpleNamespace(**sizes, **image, **exits, **losses, **rest, **never, backbone=backbone, train_strategy=strategy)


def raw(theirs: Any, image: Tensor) -> list[Tensor]:
    """Logits of the final classifier and of every exit."""
    tokens, *_, more = theirs.deit(image)
    if hasattr(theirs, "classifier"):
        final = theirs.classifier(tokens[:, 0])
    else:
        final = (theirs.cls_classifier(tokens[:, 0]) + theirs.distillation_classifier(tokens[:, 1])) / 2
    return [final, *[said[0] for said in more["highway"]]]


def same(name: str, theirs: Any) -> Any:
    """Ours with their weights, after a look whether both say the same."""
    ours: Any = formarium.create(name)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.02)
    load_state(ours, theirs.state_dict(), source="theirs")
    x = torch.randn(1, 3, 224, 224)
    a, b = calling(ours, lambda: ours(x))(), calling(theirs, lambda: raw(theirs, x))()
    for mine, other in zip((a.logits, *a.exits), b, strict=True):
        if not torch.allclose(mine, other, atol=1e-3 * float(other.abs().max())):
            raise SystemExit(f"{name} says something else than formarium: {(mine - other).abs().max():.2g}")
    return ours
