"""Degradations of real photographs, as Real-ESRGAN imitates them (Wang et al., ICCVW 2021, arXiv 2107.10833, section 3).

An image goes twice through blur, resizing, noise and JPEG, each drawn anew (a second-order degradation), and comes to its size by a last
resize with a sinc filter, before or after the second JPEG. Blurs are Gaussian, generalised Gaussian or plateau kernels, round or stretched
and turned, or sinc filters, which ring; noise is Gaussian or Poisson, in colour or grey. Ranges are those that Real-ESRGAN and Real-HAT
were trained with. All that is random comes from one generator.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.special import j1
from torch import Tensor

from formarium.nn.filters import filter2d, usm_sharpen

Range = tuple[float, float]

SIZES = tuple(range(7, 22, 2))  # of kernels
KERNELS = {  # how often each is drawn
    "iso": 0.45,
    "aniso": 0.25,
    "generalized_iso": 0.12,
    "generalized_aniso": 0.03,
    "plateau_iso": 0.12,
    "plateau_aniso": 0.03,
}
SINC = 0.1  # of the kernels are sinc filters instead
FINAL_SINC = 0.8  # how often the last resize has one
GENERALIZED, PLATEAU = (0.5, 4.0), (1.0, 2.0)  # ranges of the kernels' shapes
GAUSSIAN = 0.5  # of the noise; the rest is Poisson
GREY = 0.4  # of the noise is the same in all channels
QUALITY = (30.0, 95.0)  # of JPEG
MODES = ("area", "bilinear", "bicubic")
LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Round:
    """What the two rounds differ in."""

    blur: float  # how often there is one
    sigma: Range  # of the kernels, pixels
    resize: tuple[float, float, float]  # how often up, down, neither
    scale: Range  # smallest and largest
    noise: Range  # standard deviation of Gaussian noise, of 255
    poisson: Range  # strength of Poisson noise


FIRST = Round(blur=1.0, sigma=(0.2, 3.0), resize=(0.2, 0.7, 0.1), scale=(0.15, 1.5), noise=(1.0, 30.0), poisson=(0.05, 3.0))
SECOND = Round(blur=0.8, sigma=(0.2, 1.5), resize=(0.3, 0.4, 0.3), scale=(0.3, 1.2), noise=(1.0, 25.0), poisson=(0.05, 2.5))


def degrade_real(clean: np.ndarray, upscale: int, rng: np.random.Generator) -> np.ndarray:
    """clean: float32 [height, width, 1 or 3] in [0, 1], sides multiples of `upscale`.

    Returns float32 [height / upscale, width / upscale, channels], rounded to 8 bits.
    """
    h, w = clean.shape[0] // upscale, clean.shape[1] // upscale
    x = to_tensor(clean)
    x = blurred(x, FIRST, rng)
    x = resized(x, None, drawn_scale(FIRST, rng), rng)
    x = noisy(x, FIRST, rng)
    x = compressed(x, rng)
    x = blurred(x, SECOND, rng)
    scale = drawn_scale(SECOND, rng)
    x = resized(x, (max(1, int(h * scale)), max(1, int(w * scale))), 1.0, rng)
    x = noisy(x, SECOND, rng)
    x = compressed(finished(x, (h, w), rng), rng) if rng.random() < 0.5 else finished(compressed(x, rng), (h, w), rng)
    return (np.round(to_array(x).clip(0, 1) * 255) / 255).astype(np.float32)


# the steps: float32 [1, channels, height, width] in, the same out -------------------------------------------------------


def blurred(x: Tensor, how: Round, rng: np.random.Generator) -> Tensor:
    if rng.random() >= how.blur:
        return x
    return filter2d(x, torch.from_numpy(random_kernel(how.sigma, rng).astype(np.float32)))


def drawn_scale(how: Round, rng: np.random.Generator) -> float:
    """Up, down or neither, and how far."""
    match rng.choice(3, p=how.resize):
        case 0:
            return float(rng.uniform(1, how.scale[1]))
        case 1:
            return float(rng.uniform(how.scale[0], 1))
    return 1.0


def resized(x: Tensor, size: tuple[int, int] | None, scale: float, rng: np.random.Generator) -> Tensor:
    """To a size, or where there is none by a factor, by one of three ways; nothing is widened against aliasing, as in the source."""
    mode = MODES[rng.integers(len(MODES))]
    if size is not None:
        return F.interpolate(x, size, mode=mode)
    smallest = 1 / min(x.shape[2:])
    return F.interpolate(x, scale_factor=max(scale, smallest), mode=mode)


def noisy(x: Tensor, how: Round, rng: np.random.Generator) -> Tensor:
    """Gaussian or Poisson noise, in colour or grey; clipped to [0, 1]."""
    gaussian, grey = rng.random() < GAUSSIAN, rng.random() < GREY
    if gaussian:
        sigma = rng.uniform(*how.noise) / 255
        shape = (1, 1, *x.shape[2:]) if grey else x.shape
        noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) * sigma
    else:
        noise = shot_noise(grey_of(x) if grey else x, rng) * rng.uniform(*how.poisson)
    return (x + noise).clamp(0, 1)


def shot_noise(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Poisson noise of an image whose brightest value is as many counts as it has different values (of 8 bits), up to a power of two."""
    levels = (x.clamp(0, 1) * 255).round()
    counts = 2.0 ** math.ceil(math.log2(len(levels.unique())))
    mean = (levels / 255).numpy()
    return torch.from_numpy((rng.poisson(mean * counts) / counts - mean).astype(np.float32))


def grey_of(x: Tensor) -> Tensor:
    return (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True) if x.shape[1] == 3 else x


def compressed(x: Tensor, rng: np.random.Generator) -> Tensor:
    return to_tensor(jpeg(to_array(x), round(rng.uniform(*QUALITY))))


def finished(x: Tensor, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Brought to its size, and mostly filtered by a sinc."""
    x = resized(x, size, 1.0, rng)
    if rng.random() >= FINAL_SINC:
        return x
    kernel = sinc_kernel(rng.uniform(math.pi / 3, math.pi), int(rng.choice(SIZES)))
    return filter2d(x, torch.from_numpy(kernel.astype(np.float32)))


# kernels: float64 [size, size], of sum 1 ------------------------------------------------------------------------------


def random_kernel(sigma: Range, rng: np.random.Generator) -> np.ndarray:
    """One of the blurs, its size and shape drawn. sigma: the range of its width in pixels (of each axis, where it is stretched)."""
    size = int(rng.choice(SIZES))
    if rng.random() < SINC:
        return sinc_kernel(rng.uniform(math.pi / 3 if size < 13 else math.pi / 5, math.pi), size)
    kind = str(rng.choice([*KERNELS], p=[*KERNELS.values()]))
    wide = rng.uniform(*sigma)
    other, angle = (rng.uniform(*sigma), rng.uniform(-math.pi, math.pi)) if kind.endswith("aniso") else (wide, 0.0)
    beta = 1.0
    if not kind.startswith(("iso", "aniso")):
        low, high = GENERALIZED if kind.startswith("generalized") else PLATEAU
        beta = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    return blur_kernel(kind, size, wide, other, angle, beta)


def blur_kernel(kind: str, size: int, sigma_x: float, sigma_y: float, angle: float, beta: float) -> np.ndarray:
    """exp(-d^beta / 2), or 1 / (1 + d^beta) for a plateau, of the squared distance d in units of sigma along axes turned by `angle`."""
    place = np.arange(size) - (size - 1) / 2
    x, y = np.meshgrid(place, place)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = (along / sigma_x) ** 2 + (across / sigma_y) ** 2
    kernel = 1 / (1 + distance**beta) if kind.startswith("plateau") else np.exp(-0.5 * distance**beta)
    return kernel / kernel.sum()


def sinc_kernel(cutoff: float, size: int) -> np.ndarray:
    """The low-pass filter of a round pass band, cut to a square. cutoff: radians a pixel, at most pi."""
    place = np.arange(size) - (size - 1) / 2
    radius = np.hypot(*np.meshgrid(place, place))
    radius[size // 2, size // 2] = 1.0
    kernel = cutoff * j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()


# between arrays and tensors -------------------------------------------------------------------------------------------


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """float32 [height, width, 1 or 3] in [0, 1], compressed at a quality of 1 to 95 and read again."""
    values = np.round(image.clip(0, 1) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values[..., 0] if values.shape[2] == 1 else values).save(buffer, "JPEG", quality=quality)
    read = np.asarray(Image.open(buffer), dtype=np.float32) / 255
    return read[..., None] if read.ndim == 2 else read


def sharpened(image: np.ndarray) -> np.ndarray:
    """float32 [height, width, channels] in [0, 1], unsharp masked."""
    return to_array(usm_sharpen(to_tensor(image)))


def to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)[None], dtype=np.float32))


def to_array(x: Tensor) -> np.ndarray:
    return x[0].permute(1, 2, 0).numpy()
