"""ARBEx: github.com/takihasan/ARBEx (arbex/models, arbex/loss.py and the balancing in arbex/train.py). Their four state dicts (extractor,
classifier, anchors, attention) are one here, the last three under `classifier`, `anchors` and `self_attn`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, State
from formarium.models.image.arbex import (
    Anchors,
    ReliabilityAttention,
    anchor_loss,
    balance,
    centre_loss,
    classification_head,
)


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    """Of PosterV2's constructor, and of the training script's options where a record has those."""
    whole = "n_classes" in theirs
    hidden = theirs.get("hidden", theirs.get("size_hidden", (384, 192, 96)))
    return {
        "side": 4 * theirs.get("windows", (28, 14, 7))[0],
        "dims": theirs.get("dims", (64, 128, 256)),
        "heads": theirs.get("heads", (2, 4, 8)),
        "dim": theirs.get("dim_emb", theirs.get("size_emb", 768)),
        "depth": theirs.get("depth", 2),
        "vit_heads": 8,
        "scale_heads": theirs.get("num_heads", 8),
        "hidden": hidden,
        "batch_norm": theirs.get("batch_norm", True),
        "anchors": theirs.get("n_anchors", 1),
        "temperature": theirs.get("temperature", 1.0),
        "delta": theirs.get("delta", 1.0),
        "attention_over": "batch",
        "unused_layers": True,
        "num_classes": theirs["n_classes"] if whole else 0,
    }


PATH, OURS = "landmark.path_{i+1}.{j}", "landmark.stages.{i}.{j}"
IR, IMAGE = "ir.net_{i+1}.net.{j}", "image.stages.{i}.{j}"


def _conv_act(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [(f"{theirs}.0", f"{ours}.layer.conv"), (f"{theirs}.1", f"{ours}.layer.norm"), (f"{theirs}.2", f"{ours}.act")]


def _depthwise(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [
        *_conv_act(f"{theirs}.net.0.net", f"{ours}.expand"),
        *_conv_act(f"{theirs}.net.1.net", f"{ours}.spatial"),
        (f"{theirs}.net.2.net.0", f"{ours}.reduce.conv"),
        (f"{theirs}.net.2.net.1", f"{ours}.reduce.norm"),
    ]


class _ARBEx(Authors):
    """What training knows beside the weights (trust, class weights) isn't in their checkpoints."""

    def import_state(self, state: Any, model: Any) -> State:
        ours = super().import_state(state, model)
        return {k: v for k, v in model.state_dict().items() if k in ("trust", "class_weights")} | ours


def to_theirs(state: State, model: Any) -> State:
    return {k: v for k, v in state.items() if k not in ("trust", "class_weights")}


def _loaded(module: Any, state: State, prefix: str) -> Any:
    """A part with the record's weights, every one of them."""
    counters = {k: v for k, v in module.state_dict().items() if k.endswith("num_batches_tracked")}
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    module.load_state_dict(counters | own)
    return module.eval()


def reliability(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """The training script's balancing and losses on given embeddings."""
    said = header["reference"]["constructor"]
    classes, count, dim = said.get("n_classes", 8), said.get("n_anchors", 1), said.get("size_emb", 768)
    head = classification_head(dim, tuple(said.get("hidden", (384,))), classes, 0.5, said.get("batch_norm", False))
    _loaded(head, state, "classifier.net.")
    anchors = _loaded(
        Anchors(classes, count, dim), {k.replace("anchors.anchors", "anchors.points"): v for k, v in state.items()}, "anchors."
    )
    size = state["self_attn.Q.weight"].shape[0]
    attention = ReliabilityAttention(classes, size // classes, dim, said.get("nhead", 1), over="batch")
    named = {authors.rename(k): v for k, v in state.items()}
    _loaded(attention, named, "attention.")
    embedding, label = inputs["embeddings"], inputs["labels"].long()
    prob = (head(embedding) / said.get("temperature", 1.0)).softmax(-1)
    out = balance(prob, anchors(embedding), attention(embedding), said.get("trust", 0.0), said.get("delta", 1.0))
    weight = inputs.get("weight")
    return {
        **out._asdict(),
        "loss_ce": torch.nn.functional.nll_loss(out.corrected.log(), label, weight),
        "loss_anchor": anchor_loss(anchors.points),
        "loss_center": centre_loss(out.distances, label, out.confidence, dim),
    }


authors = _ARBEx(
    names=[
        *_depthwise(f"{PATH}.net.{{k}}", f"{OURS}.{{k}}"),
        *_depthwise(PATH, OURS),
        *_conv_act(f"{PATH}.net", OURS),
        *_conv_act("ir.input_layer", "image.stem"),
        (f"{IR}.res.0", f"{IMAGE}.norm"),
        (f"{IR}.res.1", f"{IMAGE}.expand"),
        (f"{IR}.res.2", f"{IMAGE}.act"),
        (f"{IR}.res.3", f"{IMAGE}.reduce.conv"),
        (f"{IR}.res.4", f"{IMAGE}.reduce.norm"),
        (f"{IR}.shortcut.0", f"{IMAGE}.shortcut.conv"),
        (f"{IR}.shortcut.1", f"{IMAGE}.shortcut.norm"),
        ("conv", "narrow"),
        ("convs.{i}", "shrink.{i}"),
        ("window_module.{i}.norm", "fusions.{i}.source_norm"),
        ("attns.{i}.table", "fusions.{i}.table"),
        ("attns.{i}.qkv", "fusions.{i}.kv"),
        ("attns.{i}.linear", "fusions.{i}.out"),
        ("ffns.{i}.gamma_1", "fusions.{i}.scale1"),
        ("ffns.{i}.gamma_2", "fusions.{i}.scale2"),
        ("ffns.{i}.mlp.0", "fusions.{i}.mlp.fc1"),
        ("ffns.{i}.mlp.3", "fusions.{i}.mlp.fc2"),
        ("ffns.{i}.norm", "fusions.{i}.norm"),
        ("embs.0.{j}", "embed.0.{j}"),
        ("embs.1", "embed.1.0"),
        ("embs.2.proj", "embed.2.0"),
        ("vit.cls_token", "cls_token"),
        ("vit.pos_embed", "positions"),
        ("vit.se_block.linear1", "gate.0"),
        ("vit.se_block.linear2", "gate.2"),
        ("vit.patch_embed.proj", "unused.patch_embed"),
        ("vit.CON1", "unused.con1"),
        ("vit.IRLinear1", "unused.linear1"),
        ("vit.IRLinear2", "unused.linear2"),
        ("vit.blocks.{i}.conv", "unused.mixers.{i}"),
        ("vit.blocks.{i}.attn.qkv", "blocks.{i}.attention.qkv"),
        ("vit.blocks.{i}.attn.proj", "blocks.{i}.attention.out"),
        ("vit.blocks.{i}", "blocks.{i}"),
        ("vit.norm", "norm"),
        ("classifier.net", "head"),
        ("anchors.anchors", "anchors.points"),
        ("self_attn.Q", "attention.query"),
        ("self_attn.K", "attention.key"),
        ("self_attn.V", "attention.value"),
        ("self_attn.attn_fn", "attention.mix"),
    ],
    config=config,
    ignore=("attns.*.index_relative",),
    to_theirs=to_theirs,
    parts={"arbex_reliability*": reliability},
)
