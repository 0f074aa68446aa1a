"""From a raw image to what the model's batch holds: resizing for evaluation, and the field's augmentations for training.

Recipe keys: crop_scale (range of a random crop's area), crop_ratio, hflip (probability), shift (pixels a small image moves), randaugment
("rand-m9-mstd0.5-inc1"), color_jitter, random_erasing (probability); for batches mixup, cutmix (alphas), mixup_prob, mixup_switch_prob and
label_smoothing. All randomness comes from the generator that is handed in, so a sample of an epoch is the same wherever it is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

from formarium.errors import BadInput
from formarium.task import BatchTransform, Sample

_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


@dataclass
class Prepare:
    """sample["image"] uint8 [h, w, 3] -> float32 [3, height, width] in [0, 1].

    Without a recipe: the shorter side to size / crop, then the centre (preprocessing: size, crop, interpolation). With one: random
    crop or shift, flip, RandAugment, colour jitter, erasing, as it says.
    """

    preprocessing: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None
    size: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        size = self.preprocessing.get("size", 224)
        self.size = (size, size) if isinstance(size, int) else tuple(size)  # type: ignore[assignment]
        self.crop = self.preprocessing.get("crop", 0.875)
        self.resample = _RESAMPLE[self.preprocessing.get("interpolation", "bicubic")]
        r = self.recipe or {}
        self.operations = parse_randaugment(r["randaugment"]) if r.get("randaugment") else None

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image = sample["image"]
        r = self.recipe
        if r is None:
            values = np.asarray(self.centre(image))
        else:
            values = self.place(image, r, rng)
            if r.get("hflip") and rng.random() < r["hflip"]:
                values = values[:, ::-1]
            if self.operations is not None or r.get("color_jitter"):
                picture = Image.fromarray(np.ascontiguousarray(values))
                picture = self.operations(picture, rng) if self.operations else jitter(picture, r["color_jitter"], rng)
                values = np.asarray(picture)
        chw = np.ascontiguousarray(values.transpose(2, 0, 1)).astype(np.float32) * np.float32(1 / 255)
        if r is not None and r.get("random_erasing") and rng.random() < r["random_erasing"]:
            erase(chw, rng)
        return {**sample, "image": chw}

    def centre(self, image: np.ndarray) -> Any:
        """The image at evaluation size, [height, width, 3]."""
        height, width = self.size
        if image.shape[:2] == (height, width):
            return image
        h, w = image.shape[:2]
        scale = max(height / h, width / w) / self.crop
        picture = Image.fromarray(image).resize((max(width, round(w * scale)), max(height, round(h * scale))), self.resample)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))

    def place(self, image: np.ndarray, r: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
        """A random crop of the image, or the centre one moved by a few pixels, at training size."""
        height, width = self.size
        if r.get("crop_scale"):
            box = random_box(image.shape[0], image.shape[1], r["crop_scale"], r.get("crop_ratio", (3 / 4, 4 / 3)), rng)
            return np.asarray(Image.fromarray(image).resize((width, height), self.resample, box=box))
        values = np.asarray(self.centre(image))
        reach = int(r.get("shift", 0))
        if not reach:
            return values
        dy, dx = rng.integers(-reach, reach + 1, size=2)
        rows, columns = (np.arange(size) + d for size, d in ((height, dy), (width, dx)))
        return values[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)]  # edges repeat


def random_box(h: int, w: int, scale: Any, ratio: Any, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """left, top, right, bottom of a crop whose share of the area and aspect ratio are drawn from ranges (Szegedy et al. 2015)."""
    for _ in range(10):
        area = h * w * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        cw, ch = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < cw <= w and 0 < ch <= h:
            left, top = rng.integers(0, w - cw + 1), rng.integers(0, h - ch + 1)
            return left, top, left + cw, top + ch
    side = min(h, w)
    left, top = (w - side) // 2, (h - side) // 2
    return left, top, left + side, top + side


def jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation times factors from 1 - strength to 1 + strength, in random order."""
    kinds: list[Callable[[Image.Image], Any]] = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for i in rng.permutation(3):
        image = kinds[i](image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


def erase(chw: np.ndarray, rng: np.random.Generator) -> None:
    """Fill one rectangle (2% to 33% of the area, aspect 0.3 to 3.3) with noise, in place (Zhong et al. 2020)."""
    _, h, w = chw.shape
    for _ in range(10):
        area = h * w * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        eh, ew = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < eh < h and 0 < ew < w:
            top, left = rng.integers(0, h - eh + 1), rng.integers(0, w - ew + 1)
            chw[:, top : top + eh, left : left + ew] = rng.random((3, eh, ew), dtype=np.float32)
            return


# RandAugment (Cubuk et al. 2020), with the operations and magnitudes the field's recipes mean -------------------------


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=(128, 128, 128))


def _signed(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() < 0.5 else value


def _solarize_add(image: Image.Image, add: int) -> Image.Image:
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def _enhance(kind: Any) -> Callable[[Image.Image, float, np.random.Generator, bool], Image.Image]:
    def op(image: Image.Image, level: float, rng: np.random.Generator, increasing: bool) -> Image.Image:
        factor = max(0.1, 1 + _signed(0.9 * level, rng)) if increasing else 0.1 + 1.8 * level
        return kind(image).enhance(factor)

    return op


Operation = Callable[[Image.Image, float, np.random.Generator, bool], Image.Image]
# level: magnitude / 10, so in [0, 1]; increasing: more magnitude always means more change
OPERATIONS: dict[str, Operation] = {
    "auto contrast": lambda im, level, rng, inc: ImageOps.autocontrast(im),
    "equalize": lambda im, level, rng, inc: ImageOps.equalize(im),
    "invert": lambda im, level, rng, inc: ImageOps.invert(im),
    "rotate": lambda im, level, rng, inc: im.rotate(_signed(30 * level, rng), Image.Resampling.BICUBIC, fillcolor=(128, 128, 128)),
    "posterize": lambda im, level, rng, inc: ImageOps.posterize(im, max(1, (4 - int(4 * level)) if inc else int(4 * level))),
    "solarize": lambda im, level, rng, inc: ImageOps.solarize(im, (256 - min(256, int(256 * level))) if inc else int(256 * level)),
    "solarize add": lambda im, level, rng, inc: _solarize_add(im, min(128, int(110 * level))),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear x": lambda im, level, rng, inc: _affine(im, (1, _signed(0.3 * level, rng), 0, 0, 1, 0)),
    "shear y": lambda im, level, rng, inc: _affine(im, (1, 0, 0, _signed(0.3 * level, rng), 1, 0)),
    "translate x": lambda im, level, rng, inc: _affine(im, (1, 0, _signed(0.45 * level, rng) * im.width, 0, 1, 0)),
    "translate y": lambda im, level, rng, inc: _affine(im, (1, 0, 0, 0, 1, _signed(0.45 * level, rng) * im.height)),
}


@dataclass(frozen=True)
class RandAugment:
    """`count` operations drawn with replacement, each applied with probability 0.5 at a magnitude drawn around the given one."""

    magnitude: float = 9
    std: float = 0.0
    count: int = 2
    increasing: bool = False

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        names = [*OPERATIONS]
        for i in rng.integers(0, len(names), size=self.count):
            if rng.random() < 0.5:
                continue
            magnitude = rng.normal(self.magnitude, self.std) if self.std else self.magnitude
            image = OPERATIONS[names[i]](image, float(np.clip(magnitude, 0, 10)) / 10, rng, self.increasing)
        return image


def parse_randaugment(text: str) -> RandAugment:
    """ "rand-m9-mstd0.5-inc1-n2": magnitude, its deviation, increasing or not, operations an image. BadInput for anything else."""
    values: dict[str, Any] = {}
    keys = {"mstd": ("std", float), "m": ("magnitude", float), "n": ("count", int), "inc": ("increasing", lambda v: bool(int(v)))}
    head, *parts = text.split("-")
    for part in parts:
        key = next((k for k in keys if part.startswith(k) and part[len(k) :].replace(".", "", 1).isdigit()), None)
        if key is None:
            head = ""
            break
        name, kind = keys[key]
        values[name] = kind(part[len(key) :])
    if head != "rand":
        raise BadInput("randaugment", expected='a text like "rand-m9-mstd0.5-inc1"', got=repr(text))
    return RandAugment(**values)


# batches ------------------------------------------------------------------------------------------------------------


def batch_transform(recipe: Mapping[str, Any], classes: int) -> BatchTransform | None:
    """Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019) and label smoothing, as batch["target"]; None where none is asked for."""
    smoothing, mixup, cutmix = (float(recipe.get(k) or 0) for k in ("label_smoothing", "mixup", "cutmix"))
    if not (smoothing or mixup or cutmix):
        return None
    prob, switch = float(recipe.get("mixup_prob", 1.0)), float(recipe.get("mixup_switch_prob", 0.5))

    def transform(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        target = F.one_hot(batch["label"], classes).float() * (1 - smoothing) + smoothing / classes
        mixes = (mixup or cutmix) and float(torch.rand((), generator=generator)) < prob and len(target) > 1
        if not mixes:
            return {**batch, "target": target}
        cut = cutmix and (not mixup or float(torch.rand((), generator=generator)) < switch)
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        lam = float(rng.beta(cutmix if cut else mixup, cutmix if cut else mixup))
        image, other = batch["image"], batch["image"].flip(0)
        if cut:
            h, w = image.shape[2:]
            ch, cw = int(h * math.sqrt(1 - lam)), int(w * math.sqrt(1 - lam))
            cy, cx = int(rng.integers(h)), int(rng.integers(w))
            top, bottom = max(0, cy - ch // 2), min(h, cy + ch // 2)
            left, right = max(0, cx - cw // 2), min(w, cx + cw // 2)
            image = image.clone()
            image[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
            lam = 1 - (bottom - top) * (right - left) / (h * w)  # the share that was left, exactly
        else:
            image = torch.lerp(other, image, lam)
        return {**batch, "image": image, "target": torch.lerp(target.flip(0), target, lam)}

    return transform
