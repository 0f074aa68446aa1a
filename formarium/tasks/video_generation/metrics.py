"""Scores of generated clips beside the true ones, predictions as plain rows, and the trivial rival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from formarium.task import Data
from formarium.tasks.frechet import frechet


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """psnr (dB, over generated pixels; at most 60), mse, ssim (scikit-image's, over frames with a generated pixel), one value a clip each.

    From 32 clips on also frechet, the Frechet distance between generated and true clips in the space of `clip_features`: it takes the place
    of FVD, whose network isn't at hand, is not comparable to it, and is what counts where nothing is known of a clip.
    """
    made = torch.cat([p.video for p in predictions]).float().cpu().numpy()
    mask = np.concatenate([b["mask"].cpu().numpy() for b in batches])[:, :, None]
    true = np.concatenate([b["video"].float().cpu().numpy() for b in batches])
    per_sample = compare(made, true, mask)
    metrics = {name: float(values.mean()) for name, values in per_sample.items()}
    if len(made) >= 32:
        metrics["frechet"] = frechet(clip_features(made), clip_features(true))
    return metrics, per_sample


def compare(made: np.ndarray, true: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Values a clip; made, true: [clips, frames, channels, h, w] in [0, 1]; mask: [clips, frames, 1, h, w]."""
    axes = (1, 2, 3, 4)
    error = ((made - true) ** 2 * mask).sum(axes) / np.maximum(mask.sum(axes) * made.shape[2], 1)
    return {"psnr": np.minimum(-10 * np.log10(np.maximum(error, 1e-12)), 60), "ssim": _ssim(made, true, mask), "mse": error}


def _ssim(made: np.ndarray, true: np.ndarray, mask: np.ndarray) -> np.ndarray:
    from skimage.metrics import structural_similarity

    window = min(7, made.shape[3] // 2 * 2 - 1)

    def of(a: np.ndarray, b: np.ndarray) -> float:
        return float(structural_similarity(a, b, channel_axis=0, data_range=1.0, win_size=window))

    values = []
    for m, t, k in zip(made, true, mask, strict=True):
        shown = np.flatnonzero(k.any((1, 2, 3)))
        values.append(np.mean([of(m[i], t[i]) for i in shown]) if len(shown) else 1.0)
    return np.array(values)


def clip_features(video: np.ndarray, dims: int = 16) -> np.ndarray:
    """float64 [clips, dims]: 4x4 block means of the frames and of their absolute differences in time, on fixed random directions.

    video: [clips, frames, channels, h, w] in [0, 1], h and w at least 4.
    """
    n, t, c, h, w = video.shape
    blocks = video[..., : h // 4 * 4, : w // 4 * 4].reshape(n, t, c, 4, h // 4, 4, w // 4).mean((4, 6))
    parts = [blocks.reshape(n, -1)]
    if t > 1:
        parts.append(4 * np.abs(np.diff(blocks, axis=1)).reshape(n, -1))
    flat = np.concatenate(parts, 1).astype(np.float64)
    return flat @ (np.random.default_rng(0).standard_normal((flat.shape[1], dims)) / np.sqrt(dims))


def rows(prediction: Any, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One dict a clip: id, its size, which frames were generated whole or in part, and where the truth is known psnr."""
    made, mask = prediction.video.float().cpu(), prediction.mask.float().cpu()
    ids = batch.get("id") or [str(i) for i in range(len(made))]
    out = []
    for i, name in enumerate(ids):
        touched = [int(t) for t in np.flatnonzero(mask[i].flatten(1).any(1).numpy())]
        out.append({"id": name, "frames": made.shape[1], "height": made.shape[3], "width": made.shape[4], "generated": touched})
    return out


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """Copy each unknown pixel from the nearest frame that knows it, the earlier of two (for prediction: the last given frame); where no
    frame does, the mean of 200 training clips. Scored on "val" under prediction, or the condition that the data have."""
    from formarium.tasks.video_generation.data import Prepare, collate

    args = data.model_args
    first = data.splits["val"][0]["video"]
    size = args.get("frame_size") or min(first.shape[1:3])
    prepare = Prepare({"size": size, "num_frames": args.get("num_frames", len(first)), "channels": args.get("channels", 3)})
    rng, train = np.random.default_rng(seed), data.splits["train"]
    mean = np.mean([prepare(train[int(i)], rng)["video"] for i in rng.permutation(len(train))[:200]], 0)
    predictions, batches = [], []
    for i in range(len(data.splits["val"])):
        batch = collate([prepare(data.splits["val"][i], rng)])
        predictions.append(Copied(torch.from_numpy(copy_nearest(batch["video"][0].numpy(), batch["mask"][0].numpy(), mean))[None]))
        batches.append(batch)
    return "copying the nearest known frame", score(predictions, batches)[0]


class Copied:
    """A prediction of the trivial rival."""

    def __init__(self, video: torch.Tensor):
        self.video = video


def copy_nearest(video: np.ndarray, mask: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """video: [frames, channels, h, w]; mask: [frames, h, w]; otherwise: as video, for pixels that no frame knows."""
    frames = np.arange(len(video))
    far = np.abs(frames[:, None] - frames[None]).astype(float) + 1e-3 * (frames[None] > frames[:, None])  # to, from
    cost = far[:, :, None, None] + 1e6 * (mask[None] > 0)
    source = cost.argmin(1)  # to h w
    copied = np.take_along_axis(video, source[:, None].repeat(video.shape[1], 1), 0)
    known = (mask == 0).any(0)
    return np.where(mask[:, None] > 0, np.where(known[None, None], copied, otherwise), video).astype(np.float32)
