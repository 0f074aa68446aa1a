"""DeiT-LT: github.com/val-iisc/DeiT-LT (deit_models/deit.py, losses.py, teacher_models/resnet_cifar_paco.py)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.authors import Authors, Rename, State, vit_config
from formarium.methods.deit_lt import Student, Teacher, class_balanced_weights, distillation_loss

BLOCK, OURS = "blocks.{i}", "trunk.blocks.{i}"


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    return {
        "trunk": "vit",
        "trunk_config": {**vit_config(theirs), "distilled": True, "resize_offset": 0.1},
        "num_classes": theirs.get("num_classes", 1000),
        "in_channels": theirs.get("in_chans", 3),
    }


def to_ours(state: State, model: Any) -> State:
    """Both tokens are one table here. What a fit adds isn't in a checkpoint of theirs."""
    out = {**state}
    if "dist_token" in out and "trunk.cls_token" in out:
        out["trunk.cls_token"] = torch.cat([out["trunk.cls_token"], out.pop("dist_token")], 1)
    for name, value in model.state_dict().items():
        if name.split(".")[0] in ("deferred", "weights", "prior", "queue", "queue_label"):
            out.setdefault(name, value)
    return out


def to_theirs(state: State, model: Student) -> State:
    out = {k: v for k, v in state.items() if k not in ("deferred", "weights", "prior", "queue", "queue_label")}
    if model.tokens:
        both = out.pop("trunk.cls_token")
        out["trunk.cls_token"], out["dist_token"] = both[:, :1], both[:, 1:]
    return out


# parts --------------------------------------------------------------------------------------------------------------

_RESNET = [
    ("layer{i+1}.{j}.conv", "net.stages.{i}.{j}.conv"),
    ("layer{i+1}.{j}.bn", "net.stages.{i}.{j}.norm"),
    ("conv1", "net.conv"),
    ("bn1", "net.norm"),
    ("fc", "classifier"),
    ("linear", "classifier"),
]
RENAMES = [Rename(theirs, ours) for theirs, ours in _RESNET]


def resnet_state(state: State) -> State:
    """A teacher's state under our names; "layer1.0.conv1" and the like keep their last number."""
    out: State = {}
    for name, value in state.items():
        if name.startswith("layer"):
            stage, block, kind, *rest = name.split(".")
            ours = f"net.stages.{int(stage.removeprefix('layer')) - 1}.{block}.{kind.replace('bn', 'norm')}"
            out[".".join([ours, *rest])] = value
        else:
            out[next((r for rule in RENAMES if (r := rule.apply(name)) is not None), name)] = value
    return out


def teacher(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> Tensor:
    """Their ResNets of CIFAR: resnet20 to resnet110, by the number of blocks in a stage."""
    said = header["reference"]["constructor"]
    depth = int("".join(ch for ch in header["reference"]["entry"].split(":")[-1] if ch.isdigit()) or 32)
    blocks = said.get("num_blocks") or said.get("layers") or [(depth - 2) // 6] * 3
    model = Teacher(blocks, 3, said.get("num_classes", 100))
    model.load_state_dict({k: v for k, v in resnet_state(state).items() if not k.endswith("num_batches_tracked")}, strict=False)
    missing = {k for k in model.state_dict() if not k.endswith("num_batches_tracked")} - {*resnet_state(state)}
    if missing or sum(p.numel() for p in model.parameters()) != header["parameters"]:
        raise ValueError(f"another network: {sorted(missing)[:3]}")
    return model.eval()(inputs["x"])[0]


def loss(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    said = header["reference"]["constructor"]
    alpha, kind = said.get("alpha", 0.5), said.get("distillation_type", "hard")
    weights = class_balanced_weights(said["counts"], said.get("beta", 0.9999)) if "counts" in said else None
    used = weights if said.get("weighted", False) else None
    labels = inputs.get("labels", inputs.get("targets"))
    target = labels if labels.is_floating_point() else labels.long()
    base = F.cross_entropy(inputs["cls_logits"], target)
    if kind == "none":
        taught = F.cross_entropy(inputs["dist_logits"], target, weight=used)
    else:
        taught = distillation_loss(inputs["dist_logits"], inputs["teacher_logits"], kind, used, said.get("tau", 1.0), released=True)
    out = {"base": (1 - alpha) * base, "distill": alpha * taught, "loss": (1 - alpha) * base + alpha * taught}
    return {**out, **({"class_weights": weights} if weights is not None else {})}


authors = Authors(
    names=[
        (f"{BLOCK}.attn.qkv", f"{OURS}.attention.qkv"),
        (f"{BLOCK}.attn.proj", f"{OURS}.attention.out"),
        (BLOCK, OURS),
        ("pos_embed", "trunk.positions"),
        ("cls_token", "trunk.cls_token"),
        ("patch_embed.proj", "trunk.embed"),
        ("norm", "trunk.norm"),
        ("head_dist", "trunk.head_distilled"),
        ("head", "trunk.head"),
    ],
    config=config,
    to_ours=to_ours,
    to_theirs=to_theirs,
    call=lambda model, inputs, header: tuple(model(inputs["x"])),
    parts={"deit_lt_teacher*": teacher, "*teacher*": teacher, "deit_lt_loss*": loss},
)
