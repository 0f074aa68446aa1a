"""VDT: github.com/RERV/VDT (models.py, diffusion/gaussian_diffusion.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from formarium.authors import Authors


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    size, channels = theirs.get("input_size", 32), theirs.get("in_channels", 4)
    return {
        "hidden_size": theirs.get("hidden_size", 1152),
        "depth": theirs.get("depth", 28),
        "num_heads": theirs.get("num_heads", 16),
        "patch_size": theirs.get("patch_size", 2),
        "mlp_ratio": theirs.get("mlp_ratio", 4.0),
        "num_frames": theirs.get("num_frames", 16) if theirs.get("mode", "video") == "video" else 1,
        "frame_size": size * 8,
        "latent_channels": channels,
        "latent_factor": 8,
        "num_classes": theirs.get("num_classes", 1000),
        "class_dropout": theirs.get("class_dropout_prob", 0.1),
        "learn_sigma": theirs.get("learn_sigma", True),
        "temporal": theirs.get("mode", "video") == "video",
    }


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> Any:
    if "noise" not in inputs:  # the network
        x, t = inputs.values()
        return model(x, t.long())
    terms = model.masked_losses(inputs["x0"], inputs["t"].long(), inputs["noise"], inputs["mask"].float())
    return {**terms, "loss": sum(terms.values())}


authors = Authors(
    names=[
        ("pos_embed", "positions"),
        ("time_embed", "times"),
        ("x_embedder.proj", "patch_embed"),
        ("t_embedder.mlp.0", "step_embed.fc1"),
        ("t_embedder.mlp.2", "step_embed.fc2"),
        ("y_embedder.embedding_table", "label_embed"),
        ("blocks.{i}.attn.proj", "blocks.{i}.attention.out"),
        ("blocks.{i}.attn", "blocks.{i}.attention"),
        ("blocks.{i}.mlp.fc1", "blocks.{i}.fc1"),
        ("blocks.{i}.mlp.fc2", "blocks.{i}.fc2"),
        ("blocks.{i}.adaLN_modulation.1", "blocks.{i}.modulation"),
        ("blocks.{i}.temporal_norm1", "blocks.{i}.temporal.norm"),
        ("blocks.{i}.temporal_attn.proj", "blocks.{i}.temporal.attention.out"),
        ("blocks.{i}.temporal_attn", "blocks.{i}.temporal.attention"),
        ("blocks.{i}.temporal_fc", "blocks.{i}.temporal.out"),
        ("final_layer.linear", "head"),
        ("final_layer.adaLN_modulation.1", "modulation"),
    ],
    config=config,
    call=call,
)
