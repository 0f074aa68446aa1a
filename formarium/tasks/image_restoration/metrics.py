"""PSNR and SSIM as BasicSR computes them, predictions as plain rows, and the trivial rival.

Both images are rounded to 8 bits, `upscale` pixels are cut from each border (none where nothing was enlarged), and "_y" scores are on the
luma of BT.601, in 16 .. 235. SSIM: 11x11 Gaussian window of sigma 1.5, the mean over places where it lies inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from formarium.nn.resizing import imresize
from formarium.task import Data
from formarium.tasks.image_restoration.degrade import Prepare


def luma(image: np.ndarray) -> np.ndarray:
    """uint8 RGB [h, w, 3] (or [h, w, 1], which stays) -> float64 [h, w, 1], BT.601, 16 .. 235."""
    if image.shape[2] == 1:
        return image.astype(np.float64)
    return (image.astype(np.float64) / 255 @ np.array([65.481, 128.553, 24.966]))[..., None] + 16


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of values up to 255; infinite where they are equal."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of values up to 255, [h, w, channels], the mean over channels; NaN where the window doesn't fit."""
    from skimage.metrics import structural_similarity

    if min(a.shape[:2]) < 11:
        return float("nan")
    options: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return float(structural_similarity(a.astype(np.float64), b.astype(np.float64), channel_axis=2, **options))


def compare(restored: np.ndarray, clean: np.ndarray, border: int) -> dict[str, float]:
    """Scores of two uint8 images [h, w, channels] of one shape, without `border` pixels at each side (where any are left)."""
    if border and min(clean.shape[:2]) > 2 * border:
        restored, clean = (a[border:-border, border:-border] for a in (restored, clean))
    a, b = luma(restored), luma(clean)
    return {"psnr_y": psnr(a, b), "ssim_y": ssim(a, b), "psnr_rgb": psnr(restored, clean)}


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """psnr_y and psnr_rgb in dB (an image restored exactly counts as 100), ssim_y; means over images."""
    rows = []
    for prediction, batch in zip(predictions, batches, strict=True):
        for i, (image, target) in enumerate(zip(to_bytes(prediction.image), to_bytes(batch["target"]), strict=True)):
            rows.append(compare(image, target, border_of(batch, i)))
    per_sample = {key: np.minimum([row[key] for row in rows], 100.0) for key in rows[0]}
    kept = {k: v for k, v in per_sample.items() if np.isfinite(v).all()}
    return {k: float(np.nanmean(v)) if np.isfinite(v).any() else float("nan") for k, v in per_sample.items()}, kept


def rows(prediction: Any, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One dict a sample: id, width and height of what was restored, and its scores where the clean image is known."""
    out = []
    images = to_bytes(prediction.image)
    targets = to_bytes(batch["target"]) if "target" in batch else None
    ids = batch.get("id") or [str(i) for i in range(len(images))]
    for i, image in enumerate(images):
        row = {"id": ids[i], "width": image.shape[1], "height": image.shape[0]}
        if targets is not None:
            row |= {k: round(v, 4) for k, v in compare(image, targets[i], border_of(batch, i)).items()}
        out.append(row)
    return out


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """Bicubic enlargement where the data are shrunk (4 times, where they don't say), else the degraded image as it is; scored on "val"."""
    scale = data.model_args.get("upscale", 4)
    prepare, rng = Prepare({"upscale": scale, "degradation": "bicubic"}), np.random.default_rng(seed)
    found = []
    for i in range(len(data.splits["val"])):
        sample = prepare(data.splits["val"][i], rng)
        image = sample["image"].transpose(1, 2, 0)
        clean = np.round(sample["target"].transpose(1, 2, 0) * 255).astype(np.uint8)
        large = imresize(image, *clean.shape[:2]) if scale > 1 else image
        found.append(compare(np.round(large.clip(0, 1) * 255).astype(np.uint8), clean, scale if scale > 1 else 0))
    name = f"bicubic enlargement x{scale}" if scale > 1 else "the degraded image"
    return name, {key: float(np.mean([min(f[key], 100.0) for f in found])) for key in found[0]}


def border_of(batch: Mapping[str, Any], index: int) -> int:
    """Pixels that scores leave out at each side."""
    known = "upscale" in batch
    scale = int(batch["upscale"][index]) if known else batch["target"].shape[-1] // batch["image"].shape[-1]
    return scale if scale > 1 else 0


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """float [batch, channels, h, w] in [0, 1] -> uint8 [batch, h, w, channels]."""
    return (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
