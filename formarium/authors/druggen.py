"""DrugGEN: github.com/HUBioDataLab/DrugGEN (src/model/models.py). Its checkpoints hold one network each; for a whole GAN both stand in one
state, under G. and D."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, Rename
from formarium.tasks.molecule_generation.model import CHEMBL_ATOMS, CHEMBL_BONDS

State = dict[str, Tensor]
BLOCK = "TransformerEncoder.Encoder_Blocks.{i}."
NAMES = [
    Rename("node_layers", "embed_nodes"),
    Rename("edge_layers", "embed_edges"),
    *(
        Rename(BLOCK + theirs, "blocks.{i}." + ours)
        for theirs, ours in (
            ("ln1", "norm_in"),
            ("ln3", "norm_nodes1"),
            ("ln4", "norm_edges1"),
            ("ln5", "norm_nodes2"),
            ("ln6", "norm_edges2"),
            ("attn.q", "attention.q"),
            ("attn.k", "attention.k"),
            ("attn.v", "attention.v"),
            ("attn.e", "attention.edge"),
            ("attn.out_e", "attention.out_edges"),
            ("attn.out_n", "attention.out_nodes"),
            ("mlp.fc1", "mlp_nodes.0"),
            ("mlp.fc2", "mlp_nodes.2"),
            ("mlp2.fc1", "mlp_edges.0"),
            ("mlp2.fc2", "mlp_edges.2"),
        )
    ),
    Rename("readout_n", "to_atoms"),
    Rename("readout_e", "to_bonds"),
    Rename("node_mlp", "score"),
    Rename("predictor", "score"),
]


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    entry = header["reference"]["entry"].split(":")[-1].split(",")[0].strip()
    plain = entry == "simple_disc" or "m_dim" in theirs
    atoms, bonds = theirs.get("nodes", theirs.get("m_dim")), theirs.get("edges", theirs.get("b_dim"))
    own: dict[str, Any] = {
        "atoms": CHEMBL_ATOMS if atoms == len(CHEMBL_ATOMS) else tuple(range(atoms)),
        "bonds": bond_names(bonds),
        "max_atoms": theirs["vertexes"],
        "act": theirs.get("act", "relu"),
        "part": "generator" if entry == "Generator" else "discriminator",
        "critic": "mlp" if plain else "graph",
    }
    if plain:
        return own
    sizes = {"dim": theirs["dim"], "heads": theirs["heads"], "mlp_ratio": theirs["mlp_ratio"]}
    depth, dropout = theirs["depth"], theirs.get("dropout", 0.0)
    return {**own, **sizes, "depth": depth, "critic_depth": depth, "dropout": dropout, "critic_dropout": dropout}


def bond_names(count: int) -> tuple[str, ...]:
    """So many bond types: those of ChEMBL first."""
    return (*CHEMBL_BONDS, *(f"OTHER{i}" for i in range(count)))[:count]


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> Any:
    if "z_e" in inputs:
        return model(inputs["z_e"], inputs["z_n"])
    (x,) = inputs.values()  # the plain critic's: atoms, then bonds, laid end to end
    c, n = model.config, model.config.max_atoms
    atoms, bonds = x.flatten(1).split([n * len(c.atoms), n * n * len(c.bonds)], 1)
    return model(bonds.unflatten(1, (n, n, len(c.bonds))), atoms.unflatten(1, (n, len(c.atoms))))


def to_ours(state: State, model: Any) -> State:
    out: State = {}
    whole = any(k.startswith("G.") for k in state) and any(k.startswith("D.") for k in state)
    alone = "generator" if any(k.startswith("readout_") for k in state) else "discriminator"
    for name, value in state.items():
        part, key = ("generator" if name.startswith("G.") else "discriminator", name[2:]) if whole else (alone, name)
        out[f"{part}.{_renamed(key, True)}"] = value
    for name in [n for n in out if ".attention.q." in n]:
        out[name.replace(".q.", ".qkv.")] = torch.cat([out.pop(name.replace(".q.", f".{k}.")) for k in "qkv"])
    return out


def to_theirs(state: State, model: Any) -> State:
    out: State = {}
    whole, plain = model.config.part == "gan", model.config.critic == "mlp"
    for name, value in state.items():
        part, key = name.split(".", 1)
        prefix = {"generator": "G.", "discriminator": "D."}[part] if whole else ""
        pieces = {key: value}
        if ".attention.qkv." in key:
            pieces = {key.replace(".qkv.", f".{k}."): v for k, v in zip("qkv", value.chunk(3), strict=True)}
        for k, v in pieces.items():
            renamed = k.replace("score.", "predictor.", 1) if plain and k.startswith("score.") else _renamed(k, False)
            out[prefix + renamed] = v
    return out


def _renamed(name: str, forward: bool) -> str:
    return next((new for r in NAMES if (new := r.apply(name, forward)) is not None), name)


authors = Authors(config=config, call=call, to_ours=to_ours, to_theirs=to_theirs)
