"""OFB: github.com/HankYe/Once-for-Both (models/vision_transformer.py, models/layers.py)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, State, vit_config
from formarium.methods.ofb import Searched, cut, gated, masked_tokens, reconstruction_loss, unit_of
from formarium.methods.ofb_space import Space, attention_cells, hidden_cells
from formarium.nn.attention import SelfAttention
from formarium.nn.mlp import MLP

PATCH_SHARES = (0.5, 0.625, 0.75, 0.875, 1.0)
SPACE = re.compile(r"trunk\.blocks\.(\d+)\.(attn|mlp)\.(alpha|score)")
KINDS = {"attn": "attention", "mlp": "mlp"}


def mode(theirs: dict[str, Any]) -> str:
    if not theirs.get("attn_search", True):
        return ""
    return "heads" if theirs.get("head_search", False) else "channels" if theirs.get("channel_search", False) else "joint"


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    """Of MIMVisionTransformer's arguments. Its attentions always have biases; qkv_bias changes nothing."""
    own = vit_config({**theirs, "qkv_bias": True})
    trunk = {**own, "distilled": theirs.get("distilled", False), "drop_path": theirs.get("drop_path_rate", 0.0)}
    return {
        "trunk": "vit",
        "trunk_config": trunk,
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": theirs.get("num_classes", 1000),
        "attention": mode(theirs),
        "mlp": theirs.get("mlp_search", True),
        "embedding": theirs.get("embed_search", True),
        "embedded": True,
        "patches": len(PATCH_SHARES) if theirs.get("patch_search", True) else 1,
        "masking": theirs.get("mae", True),
        "even": True,
        "target_gflops": theirs.get("target_flops", 1.0),
    }


def noted_w(header: dict[str, Any], default: float) -> float:
    said = header["reference"]["constructor"].get("w_p")
    found = re.search(r"w_p ?= ?([0-9.]*[0-9])", header.get("note", ""))
    return float(said if said is not None else found[1] if found else default)


def call(model: Searched, inputs: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that a search step computes: eval logits, costs, losses, and the masked pass."""
    theirs, image = header["reference"]["constructor"], next(iter(inputs.values()))
    model.set_w(noted_w(header, 0.99))
    one_hot, logits = model.one_hot_losses(), model(image)
    out = {"eval_logits": logits, "logits": logits, "out": logits, "original_gflops": logits.new_tensor(model.gflops()[0])}
    out |= {"searched_gflops": model.gflops()[1], "flops_loss": model.budget_loss()}
    out |= {"sparsity_attn": one_hot["attention"], "sparsity_mlp": one_hot["mlp"], "sparsity_embed": one_hot["embedding"]}
    out["sparsity_patch"] = logits.new_zeros(())
    if "noise" in inputs and model.config.masking:
        keep = PATCH_SHARES[0] if model.config.patches > 1 else theirs.get("mask_ratio", 1.0)
        masked = masked_tokens(inputs["noise"], keep)
        out["train_logits"], painted = model.search(image, masked)
        grid = model._token_grid(image)
        out["reconstruction_loss"] = reconstruction_loss(image, painted, masked.unflatten(1, grid))
    return out


def modules(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """An attention and an MLP by themselves: searched, compressed twice, and as they are then."""
    theirs, x = header["reference"]["constructor"], inputs["x"]
    dim, heads, hidden = theirs["dim"], theirs["num_heads"], theirs["mlp_hidden"]
    scale = float(theirs.get("alpha_scale", (re.findall(r"multiplied by (\d+)", header.get("note", "")) or [1])[0]))
    how = {"joint": "units"}.get(mode(theirs), mode(theirs))
    cells = attention_cells(heads, dim // heads)
    own = ((heads,) if how == "channels" else cells[0], (dim // heads,) if how == "heads" else cells[1])
    made = {
        "attn": (SelfAttention(dim, heads), Space((heads, dim // heads), *own, how)),
        "mlp": (MLP(dim, hidden), Space((1, hidden), (1,), hidden_cells(hidden))),
    }
    out: dict[str, Tensor] = {}
    for key, (module, space) in made.items():
        unit = unit_of(key, module)
        assert unit is not None
        names = {"qkv": "qkv", "proj": "out", "fc1": "fc1", "fc2": "fc2"}
        parts = {k.removeprefix(f"{key}."): v for k, v in state.items() if k.startswith(f"{key}.")}
        layers = {k.replace(a, b, 1): v for k, v in parts.items() for a, b in names.items() if k.startswith(f"{a}.")}
        module.load_state_dict(layers)
        space.load_state_dict({"alpha": scale * parts["alpha"], "score": parts["score"], "alive": space.alive})
        space.w = noted_w(header, 0.99)
        gated(module, unit, space)
        out[f"{key}_search"] = module(x)
        for _ in range(2):
            space.compress()
        size = space.extent()
        out[f"{key}_active_cells"] = space.alive[: space.heads.index(size[0]) + 1, : space.widths.index(size[1]) + 1].float()
        score = space.gate() if int(space.alive.sum()) == 1 else space.score.expand(space.size)
        out[f"{key}_score"] = score.flatten()[space.kept(*size)]
        out[f"{key}_compressed"] = cut_module(module, unit, space)(x)
    return out


def cut_module(module: Any, unit: Any, space: Space) -> Any:
    """The module with its weights really cut to the largest living size, gates folded."""
    from formarium.methods.ofb import fold

    fold(module, unit)
    cut(module, unit, space.kept(*space.extent()))
    return module


def to_ours(state: State, model: Searched) -> State:
    out: State = {}
    index = {unit.name: k for k, unit in enumerate(model.units)}
    for name, value in state.items():
        if found := SPACE.fullmatch(name):
            out[f"spaces.{index[f'blocks.{found[1]}.{KINDS[found[2]]}']}.{found[3]}"] = value
        elif name == "embedding.alpha":
            out[name] = value.view(1, -1)
        elif name != "trunk.distillation_token":
            out[name] = value
    if "trunk.distillation_token" in state:
        out["trunk.cls_token"] = torch.cat([state["trunk.cls_token"], state["trunk.distillation_token"]], 1)
    own = model.state_dict()
    return {**{k: v for k, v in own.items() if _ours_alone(k)}, **out}


def to_theirs(state: State, model: Searched) -> State:
    out: State = {}
    for name, value in state.items():
        found = re.fullmatch(r"spaces\.(\d+)\.(alpha|score)", name)
        if found:
            block, part = model.units[int(found[1])].name.removeprefix("blocks.").split(".")
            out[f"trunk.blocks.{block}.{'attn' if part == 'attention' else part}.{found[2]}"] = value
        elif name == "trunk.cls_token" and value.shape[1] == 2:
            out[name], out["trunk.distillation_token"] = value[:, :1], value[:, 1:]
        elif name == "embedding.alpha" and not model.embedding.searched:
            out[name] = value.view(-1)
        elif not _ours_alone(name):
            out[name] = value
    return out


def _ours_alone(name: str) -> bool:
    return name in ("sizes", "progress") or name.endswith(".alive")


BLOCK = "trunk.blocks.{i}"
authors = Authors(
    names=[
        ("cls_token", "trunk.cls_token"),
        ("dist_token", "trunk.distillation_token"),
        ("pos_embed", "trunk.positions"),
        ("patch_embed.proj", "trunk.embed"),
        ("patch_embed.alpha", "embedding.alpha"),
        ("patch_embed.score", "embedding.score"),
        ("blocks.{i}.attn.qkv", f"{BLOCK}.attention.qkv"),
        ("blocks.{i}.attn.proj", f"{BLOCK}.attention.out"),
        ("blocks.{i}", BLOCK),
        ("norm", "trunk.norm"),
        ("head", "trunk.head"),
        ("head_dist", "trunk.head_distilled"),
    ],
    config=config,
    call=call,
    to_ours=to_ours,
    to_theirs=to_theirs,
    parts={"*bimask*": modules},
)
