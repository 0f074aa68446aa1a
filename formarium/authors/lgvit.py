"""LGViT: github.com/lostsword/LGViT (models/deit_highway for ViT and DeiT, models/swin_highway for Swin, on transformers' networks)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, State, load_state
from formarium.catalogue import create
from formarium.methods.lgvit import EarlyExit, distillation_loss

LAYER, STAGE = "deit.encoder.layer.{i}", "swin.encoder.layers.{i}.blocks.{j}"
OURS, SWIN = "trunk.blocks.{i}", "trunk.stages.{i}.blocks.{j}"


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    """Of the records' flat constructors, with transformers' names."""
    backbone = theirs.get("backbone", "Swin" if "depths" in theirs else "ViT")
    size = {"image_size": theirs.get("image_size", 224), "patch_size": theirs.get("patch_size", 4 if backbone == "Swin" else 16)}
    if backbone == "Swin":
        names = {"embed_dim": "dim", "depths": "depths", "num_heads": "heads", "window_size": "window", "mlp_ratio": "mlp_ratio"}
        own = {ours: theirs[key] for key, ours in names.items() if key in theirs}
        trunk = {**size, **own, "norm_eps": theirs.get("layer_norm_eps", 1e-5)}
    else:
        dim = theirs.get("hidden_size", 768)
        trunk = {
            **size,
            "dim": dim,
            "depth": theirs.get("num_hidden_layers", 12),
            "heads": theirs.get("num_attention_heads", 12),
            "mlp_ratio": theirs.get("intermediate_size", 4 * dim) / dim,
            "qkv_bias": theirs.get("qkv_bias", True),
            "norm_eps": theirs.get("layer_norm_eps", 1e-12),
            "distilled": backbone == "DeiT",
        }
    exits = theirs["position_exits"]
    if any(isinstance(e, (list, tuple)) for e in exits):  # theirs count inside each of Swin's stages
        before = [sum(trunk.get("depths", (2, 2, 18, 2))[:i]) for i in range(len(exits))]
        exits = [start + e for start, stage in zip(before, exits, strict=True) for e in stage]
    return {
        "trunk": "swin" if backbone == "Swin" else "vit",
        "trunk_config": trunk,
        "exits": exits,
        "heads": theirs.get("heads", ()),
        "num_classes": theirs.get("num_labels", 1000),
    }


def to_ours(state: State, model: Any) -> State:
    """Queries, keys and values become one projection; numbered exits of Swin's stages one list."""
    out: State = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\.attention)\.attention\.(query|key|value)\.(weight|bias)", name)
        if found is None:
            out[name] = value
        elif found[2] == "query":
            rest = [state[f"{found[1]}.attention.{part}.{found[3]}"] for part in ("key", "value")]
            out[f"{found[1]}.qkv.{found[3]}"] = torch.cat([value, *rest])
    if {"trunk.cls_token", "trunk.distillation_token"} <= {*out}:
        out["trunk.cls_token"] = torch.cat([out["trunk.cls_token"], out.pop("trunk.distillation_token")], 1)
    swin = sorted({tuple(map(int, m.groups())) for n in out if (m := re.match(r"swin\.encoder\.layers\.(\d+)\.highway\.(\d+)\.", n))})
    for place, (stage, index) in enumerate(swin):
        prefix = f"swin.encoder.layers.{stage}.highway.{index}."
        for name in [n for n in out if n.startswith(prefix)]:
            out[f"exits.{place}.{_exit(name.removeprefix(prefix))}"] = out.pop(name)
    return out


def to_theirs(state: State, model: EarlyExit) -> State:
    """The other way round."""
    out: State = {}
    stages = [int(p.split(".")[1]) for p in model.places] if model.config.trunk == "swin" else []
    for name, value in state.items():
        found = re.fullmatch(r"(trunk\..*\.attention)\.qkv\.(weight|bias)", name)
        if found is not None:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[f"{found[1]}.attention.{part}.{found[2]}"] = piece
        elif name == "trunk.cls_token" and value.shape[1] == 2:
            out["trunk.cls_token"], out["trunk.distillation_token"] = value[:, :1], value[:, 1:]
        elif stages and (m := re.match(r"exits\.(\d+)\.(.*)", name)):
            own = [stages[e - 1] for e in model.config.exits]
            place = int(m[1])
            out[f"swin.encoder.layers.{own[place]}.highway.{own[:place].count(own[place])}.{_exit(m[2], back=True)}"] = value
        elif name != "steps":
            out[name] = value
    return out


_EXIT = (
    ("mlp.conv1.0", "head.expand"),
    ("mlp.conv1.2", "head.expand_norm"),
    ("mlp.proj_bn", "head.depthwise_norm"),
    ("mlp.conv2.0", "head.project"),
    ("mlp.conv2.1", "head.project_norm"),
    ("mlp.qkv", "head.attention.qkv"),
    ("classifier.layernorm", "norm"),
    ("classifier.classifier", "classifiers.0"),
)


def _exit(name: str, back: bool = False) -> str:
    """A name inside one of Swin's exits; `mlp.proj` is a convolution in a local head and a projection in a global one."""
    if back and name.startswith("head.depthwise."):
        return name.replace("head.depthwise.", "mlp.proj.")
    if back and name.startswith("head.attention.out."):
        return name.replace("head.attention.out.", "mlp.proj.")
    for theirs, ours in _EXIT:
        source, target = (ours, theirs) if back else (theirs, ours)
        if name.startswith(f"{source}."):
            return target + name.removeprefix(source)
    return name


class _LGViT(Authors):
    """`mlp.proj` needs to know its head, so exits are renamed with the whole state at hand."""

    def import_state(self, state: Any, model: Any) -> State:
        known = {}
        for name, value in state.items():
            if ".mlp.proj." in name and ".highway." in name:
                ours = "depthwise" if name.replace(".mlp.proj.", ".mlp.conv1.0.") in state else "attention.out"
                name = name.replace(".mlp.proj.", f".head.{ours}.")
            known[name] = value
        known.setdefault("steps", torch.zeros((), dtype=torch.int64))
        return super().import_state(known, model)


def run(model: EarlyExit, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What their forward gives when no sample leaves."""
    final, read = model._trace(inputs["x"])
    exits = []
    for i, head in enumerate(model.exits):
        logits, features = head(read[model._place(i)])
        exits.append({"logits": logits, "confidence": logits.softmax(-1).max(), "features": features})
    return {"final_logits": final, "exits": exits}


def whole(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Any]:
    values = config(dict(header["reference"]["constructor"]), header)
    base = "lgvit_swin_base" if values["trunk"] == "swin" else "lgvit_vit_base"
    model: Any = create(base, **values)
    load_state(model, state, source="the record")
    return run(model.eval(), inputs)


def distillation(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    said = header["reference"]["constructor"]
    features = [inputs[f"feature{i}"] for i in range(sum(k.startswith("feature") for k in inputs))]
    kinds = said.get("heads") or (
        "conv1_1",
        "conv1_1",
        "conv2_1",
        "conv2_1",
        "attention_r2",
        "attention_r2",
        "attention_r3",
        "attention_r3",
    )
    last = inputs["teacher_tokens"]
    side = round(last.shape[1] ** 0.5)
    out = distillation_loss(
        [*inputs["logits"].unbind(1)],
        features,
        kinds,
        inputs["teacher_logits"],
        last,
        (side, side),
        inputs["labels"].long(),
        said.get("loss_coefficient", 0.3),
        said.get("hete_coefficient", 0.01),
        said.get("homo_coefficient", 0.01),
        said.get("T", 2),
    )
    return {**out.terms, "total": out.total}


authors = _LGViT(
    names=[
        ("deit.embeddings.cls_token", "trunk.cls_token"),
        ("deit.embeddings.distillation_token", "trunk.distillation_token"),
        ("deit.embeddings.position_embeddings", "trunk.positions"),
        ("deit.embeddings.patch_embeddings.projection", "trunk.embed"),
        ("deit.layernorm", "trunk.norm"),
        (f"{LAYER}.attention.output.dense", f"{OURS}.attention.out"),
        (f"{LAYER}.attention.attention", f"{OURS}.attention.attention"),
        (f"{LAYER}.layernorm_before", f"{OURS}.norm1"),
        (f"{LAYER}.layernorm_after", f"{OURS}.norm2"),
        (f"{LAYER}.intermediate.dense", f"{OURS}.mlp.fc1"),
        (f"{LAYER}.output.dense", f"{OURS}.mlp.fc2"),
        *((f"deit.encoder.highway.{{i}}.{theirs}", f"exits.{{i}}.{ours}") for theirs, ours in _EXIT),
        ("deit.encoder.highway.{i}.classifier", "exits.{i}.classifiers.0"),
        ("deit.encoder.highway.{i}.cls_classifier", "exits.{i}.classifiers.0"),
        ("deit.encoder.highway.{i}.distillation_classifier", "exits.{i}.classifiers.1"),
        ("deit.encoder.highway.{i}.head", "exits.{i}.head"),
        ("classifier", "trunk.head"),
        ("cls_classifier", "trunk.head"),
        ("distillation_classifier", "trunk.head_distilled"),
        ("swin.embeddings.patch_embeddings.projection", "trunk.embed"),
        ("swin.embeddings.norm", "trunk.embed_norm"),
        ("swin.layernorm", "trunk.norm"),
        (f"{STAGE}.attention.self.relative_position_bias_table", f"{SWIN}.attention.table"),
        (f"{STAGE}.attention.self", f"{SWIN}.attention.attention"),
        (f"{STAGE}.attention.output.dense", f"{SWIN}.attention.out"),
        (f"{STAGE}.layernorm_before", f"{SWIN}.norm1"),
        (f"{STAGE}.layernorm_after", f"{SWIN}.norm2"),
        (f"{STAGE}.intermediate.dense", f"{SWIN}.mlp.fc1"),
        (f"{STAGE}.output.dense", f"{SWIN}.mlp.fc2"),
        ("swin.encoder.layers.{i}.downsample.reduction", "trunk.stages.{i}.merge.reduce"),
        ("swin.encoder.layers.{i}.downsample.norm", "trunk.stages.{i}.merge.norm"),
    ],
    ignore=("deit.pooler.*", "*relative_position_index"),
    config=config,
    to_ours=to_ours,
    to_theirs=to_theirs,
    parts={"lgvit_distillation*": distillation, "*": whole},
)
