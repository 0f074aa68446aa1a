"""Gated class-attention: github.com/OcraM17/GCAB-CFDC (continual/GCAB.py on continual/convit.py)."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.authors import Authors, State
from formarium.errors import BadInput
from formarium.methods.gated_class_attention import Continual, Projector, gate, gradient_factor, sparsity

SAB, TAB, OURS, SHARED = "sabs.{i}", "tabs.{i}", "trunk.blocks.{i}", "attention.{i}"
STATE = ("used0", "used2", "current", "steps", "history", "aware")  # what a checkpoint of theirs doesn't say


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    for key, only in (("individual_classifier", "1-1"), ("class_attention", True), ("norm_layer", "layer"), ("use_pos_embed", True)):
        if theirs.get(key, only) != only:
            raise BadInput(key, expected=f"{only!r}, as in every published setting", got=repr(theirs[key]))
    size, depth = theirs.get("img_size", 32), theirs.get("depth", 6)
    local = theirs.get("local_up_to_layer", depth - 1)
    first, tasks = theirs.get("first_task_classes", 10), theirs.get("num_tasks", 10)
    increment = theirs.get("increment", first)
    heads, qkv_bias, ratio = theirs.get("num_heads", 12), theirs.get("qkv_bias", False), theirs.get("mlp_ratio", 4)
    trunk = {
        "image_size": tuple(size) if isinstance(size, (list, tuple)) else size,
        "patch_size": theirs.get("patch_size", 4),
        "dim": theirs.get("embed_dim", 384),
        "depth": local,
        "heads": heads,
        "mlp_ratio": ratio,
        "qkv_bias": qkv_bias,
        "locality": theirs.get("locality_strength", 1.0),
    }
    return {
        "trunk": "convit",
        "trunk_config": trunk,
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": first + increment * (tasks - 1),
        "first_task": first,
        "increment": increment,
        "num_tasks": tasks,
        "seen": theirs.get("tasks_seen", 1),
        "heads": heads,
        "mlp_ratio": ratio,
        "qkv_bias": qkv_bias,
        "blocks": depth - local,
        "smax": theirs.get("smax", 800),
        "memory": False,
    }


def projected(name: str, value: Tensor) -> Tensor:
    """A projector's 1x1 convolution as a linear layer, its norm over [dim, 1, tokens] as one over [tokens, dim]; or back."""
    if ".norm." in name:
        return value[:, 0].T.contiguous() if value.ndim == 3 else value.T.unsqueeze(1).contiguous()
    if name.endswith("weight"):
        return value[:, :, 0, 0] if value.ndim == 4 else value[:, :, None, None]
    return value


def to_ours(state: State, model: Any) -> State:
    out = {k: projected(k, v) if k.startswith("projectors.") else v for k, v in state.items()}
    for name, value in model.state_dict().items():
        if name in STATE or name.startswith("last_"):
            out.setdefault(name, value)
    return out


def to_theirs(state: State, model: Continual) -> State:
    kept = {k: v for k, v in state.items() if k not in STATE and not k.startswith("last_")}
    return {k: projected(k, v) if k.startswith("projectors.") else v for k, v in kept.items()}


def run(model: Continual, inputs: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Any]:
    """At inference, and as in training with s = 5 (where nothing is projected)."""
    found = re.search(r"training: s=([0-9.]+[0-9])", header.get("note", ""))
    full, soft = model.answer(inputs["x"]), model.answer(inputs["x"], float(found[1]) if found else 5.0, project=False)

    def said(out: Any) -> dict[str, Tensor]:
        return {"logits": out.logits, "gate_embed": out.gate[None], "gate_mlp": out.hidden_gate[None], "features": out.features}

    return {"inference": said(full), "training": said(soft)}


def losses(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    c = header["reference"]["constructor"]
    smax, s = c.get("smax", 800), float(inputs["s"])
    names = {"0": "expand", "1": "norm", "3": "project"}
    own = {}
    for name, value in state.items():
        _, layer, kind = name.split(".")
        own[f"{names[layer]}.{kind}"] = projected(f".{names[layer]}.{kind}", value)
    model = Projector(c.get("dim", 384), c.get("tokens", 64))
    model.load_state_dict(own)
    x = model(inputs["feats"])
    gates = [gate(inputs["e0"], s), gate(inputs["e2"], s)]
    weight = c.get("lambda_gcab", 0.05)
    wanted = F.one_hot(inputs["targets"].long(), inputs["logits"].shape[1]).float()
    return {
        "bce": F.binary_cross_entropy_with_logits(inputs["logits"], wanted),
        "gate_penalty": weight * sparsity(gates, [inputs["prev0"], inputs["prev2"]]),
        "gate_penalty_first_task": weight * sparsity(gates, None),
        "projected": x,
        "drift": c.get("lambda_pfr", 0.001) * torch.linalg.vector_norm(inputs["teacher"] - x),
        "embedding_gradient_factor_log": gradient_factor(inputs["e0"], s, smax, c.get("thres_cosh", 50)).log(),
    }


authors = Authors(
    names=[
        (f"{SAB}.attn.gating_param", f"{OURS}.attention.gate"),
        (f"{SAB}.attn.pos_proj", f"{OURS}.attention.position"),
        (f"{SAB}.attn.proj", f"{OURS}.attention.out"),
        (f"{SAB}.attn", f"{OURS}.attention"),
        (SAB, OURS),
        (f"{TAB}.attn.q", f"{SHARED}.q"),
        (f"{TAB}.attn.k", f"{SHARED}.k"),
        (f"{TAB}.attn.v", f"{SHARED}.v"),
        (f"{TAB}.attn.proj", f"{SHARED}.out"),
        (f"{TAB}.mlp.fc1", f"{SHARED}.fc1"),
        (f"{TAB}.mlp.fc2", f"{SHARED}.fc2"),
        (f"{TAB}.norm1", f"{SHARED}.norm1"),
        (f"{TAB}.norm2", f"{SHARED}.norm2"),
        ("head.{i}.head", "classifiers.{i}"),
        ("head.{i}.norm", "norms.{i}"),
        ("embs_0.weight", "gates0"),
        ("embs_2.weight", "gates2"),
        ("projectors.{i}.0", "projectors.{i}.expand"),
        ("projectors.{i}.1", "projectors.{i}.norm"),
        ("projectors.{i}.3", "projectors.{i}.project"),
        ("pos_embed", "trunk.positions"),
        ("patch_embed.proj", "trunk.embed"),
    ],
    ignore=("task_tokens.*",),
    config=config,
    to_ours=to_ours,
    to_theirs=to_theirs,
    call=run,
    parts={"gated_class_attention_losses*": losses},
)
