"""TokenCut: github.com/YangtaoWANG95/TokenCut (object_discovery.py, bilateral_solver.py) on DINO's ViT (dino/vision_transformer.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from formarium.authors import Authors, State, load_state
from formarium.lenses.tokencut import DinoViT, refined
from formarium.nn.normalised_cut import normalised_cut


def cut(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    said = header["reference"]["constructor"]
    features = inputs["feats"][0, 1:].numpy()
    found = normalised_cut(
        features, tuple(said["dims"]), said.get("tau", 0), said.get("eps", 1e-5), weighted=said.get("no_binary_graph", False)
    )
    box = found.box(tuple(said["scales"]), tuple(said["init_image_size"][1:]))
    return {
        "box": torch.tensor(box, dtype=torch.float64),
        "mask": torch.from_numpy(found.mask.astype(np.float64)),
        "seed": torch.tensor([found.seed]),
        "eigvec": torch.from_numpy(found.vector),
    }


def solver(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    said = header["reference"]["constructor"]
    names = {
        "lam": "smoothness", "confidence": "confidence", "A_diag_min": "diagonal_min", "cg_tol": "tolerance", "cg_maxiter": "iterations",
        "sigma_spatial": "sigma_spatial", "sigma_luma": "sigma_luma", "sigma_chroma": "sigma_chroma",
    }  # fmt: skip
    bandwidths = {"sigma_spatial": 24, "sigma_luma": 4, "sigma_chroma": 4}  # theirs where none is given
    options = {**bandwidths, **{ours: said[theirs] for theirs, ours in names.items() if theirs in said}}
    soft, mask = refined(inputs["image"].numpy().astype(np.uint8), inputs["target"].numpy(), **options)
    return {"soft": torch.from_numpy(soft), "binary": torch.from_numpy(mask.astype(np.float32))}


def keys(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    said = header["reference"]["constructor"]
    vit = DinoViT.of(
        patch_size=said["patch_size"],
        dim=said["embed_dim"],
        depth=said["depth"],
        heads=said["num_heads"],
        mlp_ratio=said.get("mlp_ratio", 4),
        qkv_bias=said.get("qkv_bias", False),
        norm_eps=said.get("eps", 1e-6),
        image_size=said["img_size"] if isinstance(said.get("img_size", 224), int) else said["img_size"][0],
    )
    load_state(vit, state, source="the record")
    found, attention = vit(inputs["x"]), vit.last_layer(inputs["x"])
    return {"keys": attention[0], "attention": attention[1], "out": found}


authors = Authors(
    names=[
        ("pos_embed", "positions"),
        ("patch_embed.proj", "embed"),
        ("blocks.{i}.attn.proj", "blocks.{i}.attention.out"),
        ("blocks.{i}.attn", "blocks.{i}.attention"),
    ],
    ignore=("head.*",),  # DINO's projection head, in checkpoints of its whole training
    parts={"tokencut_ncut*": cut, "tokencut_bilateral*": solver, "tokencut_vit*": keys, "*": cut},
)
