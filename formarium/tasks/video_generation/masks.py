"""Which pixels of a clip are to be generated: one mask for every way of giving a part and asking for the rest.

A mask is float32 [frames, height, width], 1 where pixels are to be generated, 0 where they are known.
"""

from __future__ import annotations

import math

import numpy as np

from formarium.errors import BadInput, UnknownName

# known: the first frames; the last ones; every few; none; one; some; some blocks of the middle frames are not
CONDITIONS = ("prediction", "backward", "interpolation", "unconditional", "animation", "random", "completion")


def condition_mask(
    condition: str, frames: int, height: int, width: int, rng: np.random.Generator, known: int = 0, step: int = 4, ratio: float = 0.8,
    area: float = 0.5,
) -> np.ndarray:  # fmt: skip
    """A mask of any of the CONDITIONS. known: frames given for prediction and backward prediction (0: half of them). step: every how many
    frames one is known for interpolation. ratio: how likely each frame is masked in "random". area: share of a frame's pixels that blocks
    cover in "completion". UnknownName for any other condition."""
    if condition == "completion":
        return completion_mask(frames, height, width, rng, area)
    return temporal_mask(condition, frames, height, width, rng, known, step, ratio)


def temporal_mask(
    condition: str, frames: int, height: int, width: int, rng: np.random.Generator, known: int = 0, step: int = 4, ratio: float = 0.8
) -> np.ndarray:
    """Whole frames, known or to be generated; see condition_mask. "animation" knows one frame, drawn at random."""
    masked = np.ones(frames, dtype=np.float32)
    if condition in ("prediction", "backward"):
        known = known or frames // 2
        if not 0 < known < frames:
            raise BadInput("known frames", expected=f"1 to {frames - 1} of {frames}", got=str(known))
        masked[slice(known) if condition == "prediction" else slice(frames - known, None)] = 0
    elif condition == "interpolation":
        masked[::step] = 0
    elif condition == "animation":
        masked[rng.integers(frames)] = 0
    elif condition == "random":
        masked[rng.random(frames) >= ratio] = 0
    elif condition != "unconditional":
        raise UnknownName("condition", condition, CONDITIONS)
    return np.broadcast_to(masked[:, None, None], (frames, height, width)).copy()


def completion_mask(frames: int, height: int, width: int, rng: np.random.Generator, area: float = 0.5) -> np.ndarray:
    """The same blocks masked in every frame but up to three first and three last ones (of 16; fewer of shorter clips)."""
    edge = min(3, (frames - 1) // 2)
    first, last = rng.integers(edge + 1, size=2)
    mask = np.zeros((frames, height, width), dtype=np.float32)
    mask[first : frames - last] = block_mask(height, width, rng, area)
    return mask


def block_mask(height: int, width: int, rng: np.random.Generator, area: float = 0.5, least: int = 4, aspect: float = 0.3) -> np.ndarray:
    """Random rectangles until `area` of the pixels is covered, or no more fits (BEiT's blockwise masking): float32 [height, width].

    least: pixels of the smallest rectangle. aspect: of the flattest one; its inverse is the steepest.
    """
    mask, wanted = np.zeros((height, width), dtype=np.float32), area * height * width
    while (left := wanted - mask.sum()) > 0:
        for _ in range(10):
            size = rng.uniform(least, max(left, least))
            shape = math.exp(rng.uniform(math.log(aspect), -math.log(aspect)))
            h, w = round(math.sqrt(size * shape)), round(math.sqrt(size / shape))
            if not (0 < h < height and 0 < w < width):
                continue
            top, at = rng.integers(height - h + 1), rng.integers(width - w + 1)
            block = mask[top : top + h, at : at + w]
            if 0 < h * w - block.sum() <= max(left, least):
                block[:] = 1
                break
        else:
            break
    return mask
