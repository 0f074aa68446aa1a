"""HAT: github.com/XPixelGroup/HAT (hat/archs/hat_arch.py); Real-HAT's discriminator and losses: github.com/XPixelGroup/BasicSR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, State
from formarium.nn.filters import filter2d, usm_sharpen
from formarium.nn.perceptual import PerceptualDistance, VGGFeatures
from formarium.nn.unet_discriminator import UNetDiscriminator
from formarium.tasks.image_restoration.adversarial import made_loss, real_loss
from formarium.tasks.image_restoration.real import KERNELS, blur_kernel, sinc_kernel

Inputs = dict[str, Tensor]

# what the released class takes for granted; its own defaults differ from every published configuration
DEFAULTS: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 1,
    "in_chans": 3,
    "embed_dim": 96,
    "depths": (6, 6, 6, 6),
    "num_heads": (6, 6, 6, 6),
}


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    t = {**DEFAULTS, **theirs}
    patch = t["patch_size"]
    height, width = (t["img_size"],) * 2 if isinstance(t["img_size"], int) else t["img_size"]
    patch_h, patch_w = (patch, patch) if isinstance(patch, int) else patch
    return {
        "dim": t["embed_dim"],
        "depths": t["depths"],
        "heads": t["num_heads"],
        "window": t.get("window_size", 7),
        "compress_ratio": t.get("compress_ratio", 3),
        "squeeze_factor": t.get("squeeze_factor", 30),
        "conv_scale": t.get("conv_scale", 0.01),
        "overlap_ratio": t.get("overlap_ratio", 0.5),
        "mlp_ratio": t.get("mlp_ratio", 4.0),
        "qkv_bias": t.get("qkv_bias", True),
        "qk_scale": t.get("qk_scale") or None,
        "image_size": (height // patch_h, width // patch_w),
        "in_channels": t["in_chans"],
        "upscale": t.get("upscale", 2),
        "image_range": t.get("img_range", 1.0),
        "upsampler": "pixelshuffle" if t.get("upsampler", "") == "pixelshuffle" else "none",
        "residual_conv": t.get("resi_connection", "1conv"),
        "absolute_positions": t.get("ape", False),
        "embed_norm": t.get("patch_norm", True),
        "drop_path": t.get("drop_path_rate", 0.1),
        "bicubic_skip": False,
    }


def to_ours(state: State, model: Any) -> State:
    """The released generators of Real-HAT come without their discriminator, which then stays as it is."""
    if any(k.startswith("discriminator.") for k in state):
        return state
    return {**state, **{k: v for k, v in model.state_dict().items() if k.startswith("discriminator.")}}


# the discriminator, whose spectrally normalised weights bear three names
PLACES = {
    "conv0": "first",
    **{f"conv{i + 1}": f"down.{i}" for i in range(3)},
    **{f"conv{i + 4}": f"up.{i}" for i in range(3)},
    **{f"conv{i + 7}": f"extra.{i}" for i in range(2)},
    "conv9": "score",
}
NORMED = {"weight_orig": "weight.original", "weight_u": "weight.0._u", "weight_v": "weight.0._v"}
DISCRIMINATOR = [
    *((f"discriminator.{a}.{k}", f"discriminator.{b}.parametrizations.{v}") for a, b in PLACES.items() for k, v in NORMED.items()),
    *((f"discriminator.{a}", f"discriminator.{b}") for a, b in PLACES.items()),
]


def discriminate(header: dict[str, Any], inputs: Inputs, state: State) -> Inputs:
    """UNetDiscriminatorSN's logits and the GAN losses, each weight divided by its first singular value (u and v are its vectors)."""
    network = UNetDiscriminator(dim=header["reference"]["constructor"]["num_feat"]).eval()
    ours = {authors.rename(f"discriminator.{k}").removeprefix("discriminator."): v for k, v in state.items()}
    for name in [k for k in ours if k.endswith("weight.original")]:
        u, _, v = torch.linalg.svd(ours[name].flatten(1), full_matrices=False)
        vectors = name.removesuffix("original")
        ours |= {f"{vectors}0._u": u[:, 0], f"{vectors}0._v": v[0]}
    network.load_state_dict(ours)
    logits = network(inputs["x"])
    return {"logits": logits, "restorer": 0.1 * real_loss(logits), "real": real_loss(logits), "made": made_loss(logits)}


def perceptual(header: dict[str, Any], inputs: Inputs, state: State) -> Inputs:
    """PerceptualLoss and its gradient."""
    weights = header["reference"]["constructor"]["layer_weights"]
    network = VGGFeatures(tuple(weights))
    network.load_state_dict({k: v for k, v in state.items() if k in network.state_dict()})
    with torch.enable_grad():
        made = inputs["made"].requires_grad_()
        loss = PerceptualDistance(network, weights)(made, inputs["truth"])
        (gradient,) = torch.autograd.grad(loss, made)
    return {"loss": loss, "gradient": gradient}


def sharpening(header: dict[str, Any], inputs: Inputs, state: State) -> Inputs:
    """USMSharp, and filter2D with two kernels."""
    x = inputs["x"]
    return {"sharp": usm_sharpen(x), "small": filter2d(x, inputs["small"]), "large": filter2d(x, inputs["large"])}


def kernels(header: dict[str, Any], inputs: Inputs, state: State) -> Inputs:
    """One of each kernel that the degradation draws."""
    c = header["reference"]["constructor"]
    found = {"sinc": sinc_kernel(c["cutoff"], c["size"])}
    for kind in KERNELS:
        other, angle = (c["sigma_y"], c["angle"]) if kind.endswith("aniso") else (c["sigma_x"], 0.0)
        found[kind] = blur_kernel(kind, c["size"], c["sigma_x"], other, angle, c["beta"] if "_" in kind else 1.0)
    return {k: torch.from_numpy(v) for k, v in found.items()}


BLOCK, THEIRS = "groups.{i}.blocks.{j}", "layers.{i}.residual_group.blocks.{j}"
OVERLAP, THEIR_OVERLAP = "groups.{i}.overlap", "layers.{i}.residual_group.overlap_attn"

authors = Authors(
    names=[
        ("conv_first", "embed"),
        ("patch_embed.norm", "embed_norm"),
        ("absolute_pos_embed", "positions"),
        (f"{THEIRS}.attn.relative_position_bias_table", f"{BLOCK}.attention.table"),
        (f"{THEIRS}.attn.proj", f"{BLOCK}.attention.out"),
        (f"{THEIRS}.attn", f"{BLOCK}.attention"),
        (f"{THEIRS}.conv_block.cab.0", f"{BLOCK}.channel.down"),
        (f"{THEIRS}.conv_block.cab.2", f"{BLOCK}.channel.up"),
        (f"{THEIRS}.conv_block.cab.3.attention.1", f"{BLOCK}.channel.gate_in"),
        (f"{THEIRS}.conv_block.cab.3.attention.3", f"{BLOCK}.channel.gate_out"),
        (THEIRS, BLOCK),
        (f"{THEIR_OVERLAP}.relative_position_bias_table", f"{OVERLAP}.table"),
        (f"{THEIR_OVERLAP}.proj", f"{OVERLAP}.out"),
        (THEIR_OVERLAP, OVERLAP),
        ("layers.{i}.conv", "groups.{i}.conv"),
        ("conv_after_body", "body"),
        ("conv_before_upsample.0", "before"),
        ("upsample", "enlarge"),
        ("conv_last", "last"),
        *DISCRIMINATOR,
    ],
    ignore=["relative_position_index_*", "attn_mask"],
    config=config,
    to_ours=to_ours,
    parts={
        "hat_discriminator*": discriminate,
        "hat_perceptual*": perceptual,
        "hat_sharpening*": sharpening,
        "hat_real_kernels*": kernels,
    },
)
