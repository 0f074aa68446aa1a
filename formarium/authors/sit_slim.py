"""SiT: github.com/Sense-X/SiT (models/lvvit.py, losses.py)."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from torch import Tensor

from formarium.authors import Authors, State
from formarium.methods.sit_slim import Slimmed, recalibration_loss


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    """Of LVViT's arguments."""
    width, depth = theirs.get("embed_dim", 384), theirs.get("depth", 16)
    stem = theirs.get("p_emb", "4cg")
    trunk = {
        "image_size": theirs.get("img_size", 224),
        "patch_size": theirs.get("patch_size", 16),
        "dim": width,
        "depth": depth,
        "heads": theirs.get("num_heads", 12),
        "mlp_ratio": theirs.get("mlp_ratio", 4.0),
        "stem": stem if stem in ("4c", "6c") else "patch",
        "skip_lam": theirs.get("skip_lam", 1.0),
        "qkv_bias": theirs.get("qkv_bias", False),
        "qk_scale": theirs.get("qk_scale"),
        "drop_path": theirs.get("drop_path_rate", 0.0),
    }
    slims = theirs.get("distillation_type") not in (None, "none")
    cuts = [*accumulate(theirs.get("stage_blocks", (1, 1, 1, 13)))][:-1] if slims else []
    return {
        "trunk": "lv_vit",
        "trunk_config": trunk,
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": theirs.get("num_classes", 1000),
        "places": tuple(f"blocks.{at - 1}" for at in cuts),
        "shares": tuple(theirs.get("keeping_ratio", 0.5) ** (i + 1) for i in range(len(cuts))),
        "reverse": slims,
    }


def call(model: Slimmed, inputs: dict[str, Tensor], header: dict[str, Any]) -> Any:
    """Their evaluation gives (logits, tokens as they are), their training (logits, logits, tokens spread again)."""
    paths = {str(o["path"]).split(".")[0] for o in header["outputs"]}
    logits, tokens = model.tokens(inputs["x"], recover=bool(paths & {"tokens", "2"}) and hasattr(model, "reverse"))
    return {"logits": logits, "tokens": tokens} if paths & {"logits", "tokens"} else (
        (logits, logits, tokens) if "2" in paths else (logits, tokens)
    )  # fmt: skip


def loss(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    said = header["reference"]["constructor"]
    weights = [said.get(k, default) for k, default in (("lambda_token", 2.0), ("lambda_logits", 2.0), ("tau", 1.0))]
    labels = inputs["targets"] if inputs["targets"].is_floating_point() else inputs["targets"].long()
    tokens = ([*inputs[f"{who}_tokens"].unbind(0)] for who in ("student", "teacher"))
    out = recalibration_loss(inputs["student_logits"], inputs["teacher_logits"], *tokens, labels, *weights)
    terms = out.terms
    whole = {"loss": out.total, "loss_cls": terms["cross_entropy"], "loss_token": terms["tokens"], "loss_logits": terms["logits"]}
    return {**whole, "loss_cnn": out.total.new_zeros(())}


BLOCK = "trunk.blocks.{i}"
authors = Authors(
    names=[
        ("cls_token", "trunk.cls_token"),
        ("pos_embed", "trunk.positions"),
        ("patch_embed.conv{i+1}", "trunk.embed.convs.{i}"),
        ("patch_embed.bn{i+1}", "trunk.embed.norms.{i}"),
        ("patch_embed.proj", "trunk.embed"),
        ("blocks.{i}.attn.qkv", f"{BLOCK}.attention.qkv"),
        ("blocks.{i}.attn.proj", f"{BLOCK}.attention.out"),
        ("blocks.{i}", BLOCK),
        ("norm", "trunk.norm"),
        ("head", "trunk.head"),
        ("aux_head", "trunk.aux_head"),
        ("tsm.{i}.weight.0", "slims.{i}.norm"),
        ("tsm.{i}.weight.1", "slims.{i}.fc1"),
        ("tsm.{i}.weight.3", "slims.{i}.fc2"),
        ("tsm.{i}.scale", "slims.{i}.scale"),
        ("rtsm.{i}", "reverse.{i}"),
    ],
    config=config,
    call=call,
    parts={"*loss*": loss},
)
