"""Phikon-v2: github.com/facebookresearch/dinov2 (encoder, heads, losses), github.com/owkin/HistoSSLscaling (ABMIL), and the names that
transformers' Dinov2Model has for the same weights (huggingface.co/owkin/phikon-v2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, State
from formarium.errors import BadCheckpoint
from formarium.models.image.phikon_v2 import ABMIL, Config, dinov2_losses
from formarium.nn.self_distillation import PrototypeHead, centred, sinkhorn_knopp

SIZES = {"vit_small": (384, 12, 6), "vit_base": (768, 12, 12), "vit_large": (1024, 24, 16), "vit_giant2": (1536, 40, 24)}


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    size = next((v for k, v in SIZES.items() if k in header["reference"]["entry"]), (768, 12, 12))
    dim, depth, heads = (theirs.get(k, v) for k, v in zip(("embed_dim", "depth", "num_heads"), size, strict=True))
    image = theirs.get("img_size", 224)
    ffn = theirs.get("ffn_layer", "mlp")
    return {
        "level": "tile",
        "image_size": image[0] if isinstance(image, (list, tuple)) else image,
        "patch_size": theirs.get("patch_size", 16),
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": theirs.get("mlp_ratio", 4.0),
        "qkv_bias": theirs.get("qkv_bias", True),
        "out_bias": theirs.get("proj_bias", True),
        "mlp_bias": theirs.get("ffn_bias", True),
        "ffn": "swiglu" if ffn.startswith("swiglu") else ffn,
        "layer_scale": theirs.get("init_values") or None,
        "registers": theirs.get("num_register_tokens", 0),
        "mask_token": "mask_token" in header["state"],
        "norm_eps": theirs.get("norm_eps", 1e-6),
        "resize_offset": theirs.get("interpolate_offset", 0.1),
        "resize_antialias": theirs.get("interpolate_antialias", False),
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": 0,
        "drop_path": theirs.get("drop_path_rate", 0.0),
        "drop_path_uniform": theirs.get("drop_path_uniform", False),
        "pretraining": False,
    }


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    masks = inputs.get("masks", inputs.get("mask"))
    image = next(v for k, v in inputs.items() if k not in ("masks", "mask"))
    tokens = model.tokens_of(image, None if masks is None else masks.bool())
    prefix = model.encoder.prefix
    return {"cls": tokens[:, 0], "registers": tokens[:, 1:prefix], "patches": tokens[:, prefix:], "out": tokens[:, 0]}


# parts --------------------------------------------------------------------------------------------------------------


def head(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> Tensor:
    c = header["reference"]["constructor"]
    made = PrototypeHead(
        c["in_dim"], c["out_dim"], c.get("hidden_dim", 2048), c.get("bottleneck_dim", 256), c.get("nlayers", 3), c.get("use_bn", False),
        c.get("mlp_bias", True),
    )  # fmt: skip
    made.load_state_dict({_head_name(k): v for k, v in state.items()}, strict=not c.get("use_bn", False))
    return made.eval()(inputs["x"])


def _head_name(name: str) -> str:
    return name.replace("last_layer.weight_g", "gain").replace("last_layer.weight_v", "direction")


def losses(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """The record's teacher logits come crop by crop, as the student's."""
    c, crops = header["reference"]["constructor"], header["reference"]["constructor"].get("global_crops", 2)
    temperature, n = c.get("teacher_temp", 0.04), c["images"]
    cls = centred(inputs["teacher_cls"], inputs["center_cls"], temperature)
    patch = centred(inputs["teacher_patch"], inputs["center_patch"][0], temperature)
    local = inputs["student_local"]
    local = local.unflatten(0, (-1, n)) if len(local) else local.view(0, n, cls.shape[-1])
    weights = (c.get("dino_weight", 1.0), c.get("ibot_weight", 1.0), c.get("koleo_weight", 0.1))
    out = dinov2_losses(
        cls.unflatten(0, (crops, n)), patch, inputs["student_global"].unflatten(0, (crops, n)),
        local, inputs["student_patch"], inputs["student_global_tokens"].unflatten(0, (crops, n)), inputs["masks"].bool(),
        c.get("student_temp", 0.1), weights,
    )  # fmt: skip
    swapped = inputs["teacher_cls"].unflatten(0, (crops, n)).flip(0).flatten(0, 1)  # theirs are stacked in reverse
    return {**out.terms, "total": out.total, "sinkhorn": sinkhorn_knopp(swapped, temperature).unflatten(0, (crops, n))}


def abmil(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """Their mask is True for padding, and the leading columns of x are no features."""
    c = header["reference"]["constructor"]
    made = ABMIL(abmil_config(c), c["in_features"], c.get("out_features", 1)).eval()
    made.load_state_dict(_abmil_to_ours(state))
    x, padding = inputs.get("x", inputs.get("features")), inputs.get("mask")
    assert x is not None
    x = x[..., c.get("metadata_cols", 3) :]
    real = torch.ones(x.shape[:2], dtype=torch.bool) if padding is None else ~padding.bool().reshape(x.shape[:2])
    logits, _ = made(x, real)
    scores = made.scores(made.embedded(x)).masked_fill(~real, 0.0)[..., None]
    return {"logit": logits, "logits": logits, "out": logits, "attention_logits": scores}


def abmil_config(c: Mapping[str, Any]) -> Config:
    activation = c.get("mlp_activation", "sigmoid")
    return Config(
        level="slide", features=c["in_features"], attention=c.get("d_model_attention", 128),
        attention_temperature=c.get("temperature", 1.0), tile_hidden=tuple(c.get("tiles_mlp_hidden") or ()), tile_bias=c.get("bias", True),
        slide_hidden=tuple(c.get("mlp_hidden") or ()), slide_dropout=tuple(c.get("mlp_dropout") or ()),
        activation=str(activation).lower().removesuffix("()"),
    )  # fmt: skip


# names --------------------------------------------------------------------------------------------------------------

BLOCK = [("attn.qkv", "attention.qkv"), ("attn.proj", "attention.out"), ("ls1.gamma", "scale1"), ("ls2.gamma", "scale2"),
         ("mlp.w12", "mlp.gates"), ("mlp.w3", "mlp.out")]  # fmt: skip
ENCODER = [
    ("pos_embed", "positions"),
    ("patch_embed.proj", "embed"),
    ("register_tokens", "register_tokens"),
    *((f"blocks.{{i}}.{t}", f"blocks.{{i}}.{o}") for t, o in BLOCK),
]
STARTS = ("cls_token", "pos_embed", "mask_token", "register_tokens", "patch_embed", "blocks", "norm")
HEADS = {"head": "student.dino_head", "patch_head": "student.ibot_head", "teacher_head": "teacher.dino_head",
         "teacher_patch_head": "teacher.ibot_head"}  # fmt: skip
OTHERS = {"pretraining.centre": "dino_loss.center", "pretraining.patch_centre": "ibot_patch_loss.center",
          "pretraining.progress": "progress"}  # fmt: skip
ABMIL_NAMES = {"value": "attention_layer.att", "gate": "attention_layer.gate", "weight": "attention_layer.w"}
_RENAME = Authors(names=ENCODER)


class _Phikon(Authors):
    """A bare encoder in either naming, a training checkpoint of DINOv2 (teacher or both), or a slide model's, each known by its keys."""

    def import_state(self, state: Mapping[str, Tensor], model: Any) -> State:
        state = from_huggingface(state) if any(".layer." in k or k.startswith("embeddings.") for k in state) else dict(state)
        out: State = {}
        for name, value in state.items():
            ours = self._ours(name, model, {*state})
            if ours is not None:
                out[ours] = value
        out |= _abmil_to_ours(out)
        out = {k: v for k, v in out.items() if not k.startswith(("tiles_emb", "attention_layer", "mlp."))}
        own = model.state_dict()
        if "pretraining.progress" in own:
            out.setdefault("pretraining.progress", own["pretraining.progress"])
            if not any(k.startswith("pretraining.head.") for k in out):  # an extractor's weights: pre-training goes on from them
                teacher = {f"pretraining.teacher.{k[8:]}": v for k, v in out.items() if k.startswith("encoder.")}
                out |= {**{k: v for k, v in own.items() if k.startswith("pretraining.")}, **teacher}
        return out

    @staticmethod
    def _ours(name: str, model: Any, every: set[str]) -> str | None:
        for ours, theirs in OTHERS.items():
            if name == theirs:
                return ours if getattr(model, "pretraining", None) is not None else None
        for ours, theirs in HEADS.items():
            if name.startswith(f"{theirs}."):
                rest = _head_name(name.removeprefix(f"{theirs}."))
                return f"pretraining.{ours}.{rest}" if getattr(model, "pretraining", None) is not None else None
        if name.startswith(("dino_head.", "ibot_head.")):  # of a file with the teacher alone
            return None
        prefix = "encoder."
        if name.startswith("student.backbone."):
            if getattr(model, "pretraining", None) is None:  # an extractor is the teacher
                return None if any(k.startswith("teacher.backbone.") for k in every) else prefix + _encoder_name(name[17:])
            return prefix + _encoder_name(name[17:])
        if name.startswith("teacher.backbone."):
            prefix = "pretraining.teacher." if getattr(model, "pretraining", None) is not None else prefix
            return prefix + _encoder_name(name[17:])
        bare = name.removeprefix("backbone.")
        return prefix + _encoder_name(bare) if bare.split(".")[0] in STARTS else name

    def export_state(self, model: Any) -> State:
        """DINOv2's bare names for an extractor, those of its training checkpoint with a teacher; ABMIL's own, numbered if several."""
        out: State = {}
        trained = getattr(model, "pretraining", None) is not None
        for name, value in model.state_dict().items():
            if name in OTHERS:
                out[OTHERS[name]] = value
            elif name.startswith("encoder."):
                theirs = _RENAME.rename(name.removeprefix("encoder."), forward=False)
                out[f"student.backbone.{theirs}" if trained else theirs] = value
            elif name.startswith("pretraining.teacher."):
                out["teacher.backbone." + _RENAME.rename(name.removeprefix("pretraining.teacher."), forward=False)] = value
            elif name.startswith("pretraining."):
                module, rest = name.removeprefix("pretraining.").split(".", 1)
                out[f"{HEADS[module]}.{rest.replace('gain', 'last_layer.weight_g').replace('direction', 'last_layer.weight_v')}"] = value
            else:
                out[name] = value
        return _abmil_to_theirs(out)


def _encoder_name(theirs: str) -> str:
    theirs = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", theirs)  # blocks in chunks keep their numbers
    return _RENAME.rename(theirs)


def _abmil_to_ours(state: Mapping[str, Tensor]) -> State:
    """One ABMIL's names; it becomes member 0 of a slide model, or the module's own names where the state is nothing but that."""
    out: State = {}
    alone = all(k.startswith(("tiles_emb.", "attention_layer.", "mlp.")) for k in state)
    layers = [int(k.split(".")[1]) for k in state if k.startswith("mlp.")]
    last = max(layers, default=0)
    prefix = "" if alone else "members.0."
    for name, value in state.items():
        if m := re.fullmatch(r"tiles_emb\.hidden_layers\.(\d+)\.(\w+)", name):
            out[f"{prefix}embed.{int(m[1]) // 2}.{m[2]}"] = value
        elif m := re.fullmatch(r"attention_layer\.(\w+)\.(\w+)", name):
            ours = next(o for o, t in ABMIL_NAMES.items() if t.endswith(f".{m[1]}"))
            out[f"{prefix}{ours}.{m[2]}"] = value
        elif m := re.fullmatch(r"mlp\.(\d+)(?:\.0)?\.(\w+)", name):
            out[f"{prefix}out.{m[2]}" if int(m[1]) == last else f"{prefix}hidden.{m[1]}.{m[2]}"] = value
    return out


def _abmil_to_theirs(state: State) -> State:
    """The first member of a lone ABMIL under their names; several stay `members.I`."""
    if any(k.startswith("members.1.") for k in state):
        return state
    hidden = len([k for k in state if re.fullmatch(r"members\.0\.hidden\.\d+\.weight", k)])
    out: State = {}
    for name, value in state.items():
        if m := re.fullmatch(r"members\.0\.embed\.(\d+)\.(\w+)", name):
            name = f"tiles_emb.hidden_layers.{2 * int(m[1])}.{m[2]}"
        elif m := re.fullmatch(r"members\.0\.(value|gate|weight)\.(\w+)", name):
            name = f"{ABMIL_NAMES[m[1]]}.{m[2]}"
        elif m := re.fullmatch(r"members\.0\.hidden\.(\d+)\.(\w+)", name):
            name = f"mlp.{m[1]}.0.{m[2]}"
        elif m := re.fullmatch(r"members\.0\.out\.(\w+)", name):
            name = f"mlp.{hidden}.{m[1]}"
        out[name] = value
    return out


# transformers' names ------------------------------------------------------------------------------------------------

HUGGINGFACE = [
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("encoder.layer.{i}.attention.output.dense", "blocks.{i}.attn.proj"),
    ("encoder.layer.{i}.layer_scale1.lambda1", "blocks.{i}.ls1.gamma"),
    ("encoder.layer.{i}.layer_scale2.lambda1", "blocks.{i}.ls2.gamma"),
    ("encoder.layer.{i}.mlp.weights_in", "blocks.{i}.mlp.w12"),
    ("encoder.layer.{i}.mlp.weights_out", "blocks.{i}.mlp.w3"),
    ("encoder.layer.{i}", "blocks.{i}"),
    ("layernorm", "norm"),
]
VIT = [  # transformers' ViTModel, which holds the first Phikon
    ("encoder.layer.{i}.layernorm_before", "blocks.{i}.norm1"),
    ("encoder.layer.{i}.layernorm_after", "blocks.{i}.norm2"),
    ("encoder.layer.{i}.intermediate.dense", "blocks.{i}.mlp.fc1"),
    ("encoder.layer.{i}.output.dense", "blocks.{i}.mlp.fc2"),
]
NEWER = {  # as its modules are called since version 5; its files keep the names above
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}
_HF, _HF_IN = Authors(names=HUGGINGFACE), Authors(names=[*VIT, *HUGGINGFACE])
_PART = re.compile(r"(.*encoder\.layer\.\d+\.attention)\.attention\.(query|key|value)\.(weight|bias)")


def from_huggingface(state: Mapping[str, Tensor]) -> State:
    """transformers' Dinov2Model (or a classifier's `dinov2.`) under DINOv2's names: queries, keys and values become one projection."""
    prefixes = re.compile(r"^(dinov2|dinov2_with_registers|vit)\.")
    state = {prefixes.sub("", k): v for k, v in state.items() if not k.startswith(("pooler.", "vit.pooler."))}
    for short, long in NEWER.items():
        state = {k.replace(f".attention.{short}.", f".attention.{long}."): v for k, v in state.items()}
    out: State = {}
    for name, value in state.items():
        m = _PART.fullmatch(name)
        if m is None:
            out[_HF_IN.rename(name)] = value
        elif m[2] == "query":
            parts = [state.get(f"{m[1]}.attention.{p}.{m[3]}") for p in ("query", "key", "value")]
            if any(p is None for p in parts):
                raise BadCheckpoint(f"{m[1]} has no query, key and value of its own")
            i = int(m[1].split(".")[2])
            out[f"blocks.{i}.attn.qkv.{m[3]}"] = torch.cat([p for p in parts if p is not None])
    return out


def to_huggingface(model: Any) -> State:
    """An extractor's weights as transformers' Dinov2Model names them."""
    out: State = {}
    bare = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    for name, value in bare.items():
        theirs = _RENAME.rename(name.removeprefix("encoder."), forward=False)
        if m := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", theirs):
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[f"encoder.layer.{m[1]}.attention.attention.{part}.{m[2]}"] = piece
        else:
            out[_HF.rename(theirs, forward=False)] = value
    return out


authors = _Phikon(
    config=config,
    call=call,
    parts={"phikon_v2*head*": head, "phikon_v2*loss*": losses, "phikon_v2*abmil*": abmil, "*abmil*": abmil},
)
