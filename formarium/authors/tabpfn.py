"""TabPFN: github.com/automl/TabPFN (tabpfn/transformer.py), version 1."""

from __future__ import annotations

from typing import Any

import torch

from formarium.authors import Authors


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    dim = theirs.get("emsize", theirs.get("ninp", 512))
    return {
        "num_features": theirs.get("num_features", 100),
        "max_classes": theirs.get("n_out", theirs.get("max_num_classes", 10)),
        "dim": dim,
        "heads": theirs.get("nhead", 4),
        "hidden": theirs.get("nhid", dim * theirs.get("nhid_factor", 2)),
        "depth": theirs.get("nlayers", 12),
        "dropout": theirs.get("dropout", 0.0),
        "activation": theirs.get("activation", "gelu"),
        "pre_norm": theirs.get("pre_norm", False),
        "efficient_masking": theirs.get("efficient_eval_masking", True),
        "full_attention": theirs.get("full_attention", False),
        "global_tokens": theirs.get("num_global_att_tokens") or 0,
        "input_norm": theirs.get("input_normalization", False),
        "root_scale": theirs.get("normalize_with_sqrt", False),
    }


def call(model: Any, inputs: dict[str, torch.Tensor], header: dict[str, Any]) -> torch.Tensor:
    """Their tensors have rows first; they read the rows behind the cut, which the record's note or constructor names."""
    x, y = inputs["x"].transpose(0, 1), inputs["y"].transpose(0, 1)
    rows, queries = x.shape[1], header["outputs"][0]["shape"][0]
    if y.shape[1] < rows:  # they may leave out the queries' labels
        y = torch.nn.functional.pad(y, (0, rows - y.shape[1]))
    x = torch.nn.functional.pad(x, (0, model.config.num_features - x.shape[2]))
    context = torch.full((x.shape[0],), rows - queries)
    return model(torch.nan_to_num(x, nan=0.0), y.float(), context)[:, rows - queries :].transpose(0, 1)


authors = Authors(
    names=[
        ("encoder", "embed_x"),
        ("y_encoder", "embed_y"),
        ("global_att_embeddings.weight", "global_tokens"),
        ("input_ln.bn", "input_norm"),
        ("transformer_encoder.layers.{i}.self_attn.in_proj_weight", "blocks.{i}.attention.qkv.weight"),
        ("transformer_encoder.layers.{i}.self_attn.in_proj_bias", "blocks.{i}.attention.qkv.bias"),
        ("transformer_encoder.layers.{i}.self_attn.out_proj", "blocks.{i}.attention.out"),
        ("transformer_encoder.layers.{i}.linear1", "blocks.{i}.fc1"),
        ("transformer_encoder.layers.{i}.linear2", "blocks.{i}.fc2"),
        ("transformer_encoder.layers.{i}", "blocks.{i}"),
    ],
    ignore=("criterion.*",),
    config=config,
    call=call,
)
