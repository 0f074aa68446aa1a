"""TokenCut (Wang et al., CVPR 2022, arXiv 2202.11539): find an image's object by cutting the graph of a transformer's patches in two.

Keys of the last attention layer are the nodes' features; nn/normalised_cut.py cuts, and the side with the strongest node is the object.
Its connected part gives a box; a bilateral solver sharpens the mask to the image's own edges (nn/bilateral.py). Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import ndimage
from torch import Tensor, nn

from formarium.catalogue import make_config, resolve
from formarium.errors import BadInput
from formarium.features import Feature, taps, trace
from formarium.lens import Lens, Report, Table
from formarium.model import Model
from formarium.nn.attention import split_heads
from formarium.nn.bilateral import bilateral_solve
from formarium.nn.normalised_cut import Cut, normalised_cut
from formarium.task import Data
from formarium.tasks.image_classification.trunks import ViT

FEWEST_PATCHES = 16  # a coarser grid has no shapes to find


class DinoViT(ViT):
    """The ViT that DINO trains (Caron et al., ICCV 2021): no classes, the class token's features as output."""

    @classmethod
    def of(cls, variant: str = "tokencut_vits16", **overrides: Any) -> DinoViT:
        """By TokenCut's variant; `.load_authors(path)` then takes DINO's backbone checkpoint."""
        card, found = resolve(variant)
        model = cls(make_config(cls.Config, {**found.config, "num_classes": 0, "resize_offset": 0.1, **overrides}))
        model.adopt(card, found.name, card.preprocessing)
        return model.eval()

    def last_layer(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [batch, 1 + patches, dim] and attention [batch, heads, 1 + patches, 1 + patches] of the last block."""
        x, grid = self.embedded(image)
        for block in self.blocks[:-1]:
            x = block(x, grid)
        last: Any = self.blocks[-1]
        q, k, _ = split_heads(last.attention.qkv(last.norm1(x)), last.attention.heads, 3)
        return k.transpose(1, 2).flatten(2), (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


@dataclass
class Discovery:
    """What was found in one image. box: (x0, y0, x1, y1) in pixels. mask: bool [height, width], soft: float [height, width] in [0, 1]."""

    cut: Cut
    box: tuple[int, int, int, int]
    mask: np.ndarray
    soft: np.ndarray


class TokenCut(Lens):
    """tau: cosine from which patches are alike; eps: the weight of all other edges. weighted: edges weigh their cosine.
    center: take the features' mean over the patches off first (what helps where the network is untrained).
    features: "keys" of the last attention layer, "tokens" of a tap, or "auto": keys where that layer sees all patches at once.
    at: the tap for tokens, by default the last one on a grid of 16 patches or more. refine: "bilateral", or "" for the patches' own mask.
    samples: images looked at.
    """

    def __init__(
        self,
        tau: float = 0.2,
        eps: float = 1e-5,
        weighted: bool = False,
        center: bool = False,
        features: str = "auto",
        at: str = "",
        refine: str = "bilateral",
        samples: int = 32,
    ):
        for name, value, known in (("features", features, ("auto", "keys", "tokens")), ("refine", refine, ("bilateral", ""))):
            if value not in known:
                raise BadInput(name, expected=" or ".join(map(repr, known)), got=repr(value))
        if not -1 <= tau < 1:
            raise BadInput("tau", expected="a cosine, from -1 to below 1", got=repr(tau))
        self.tau, self.eps, self.weighted, self.center = tau, eps, weighted, center
        self.features, self.at, self.refine, self.samples = features, at, refine, samples

    def needs(self, model: Model) -> str:
        if not hasattr(model, "normalise") or not hasattr(model, "image_size"):
            return "it doesn't take images"
        return "" if taps(model, self.at or "*") else f"it has no tap {self.at or ''}".rstrip()

    # one image --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def discover(self, model: Model, image: np.ndarray) -> Discovery:
        """The object in one image, uint8 [height, width, 3].

        Raises BadInput where the image isn't one, or the model has too few patches to cut.
        """
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            got = f"{image.dtype} {[*image.shape]}" if hasattr(image, "dtype") else type(image).__name__
            raise BadInput("image", expected="uint8 [height, width, 3]", got=got)
        ready, pad = self._prepared(model, image)
        patches, grid = self._patches(model, ready)
        if self.center:
            patches = patches - patches.mean(0)
        cut = normalised_cut(patches.float().cpu().numpy(), grid, self.tau, self.eps, self.weighted)
        side = (ready.shape[2] / grid[0], ready.shape[3] / grid[1])  # of a patch, in the model's pixels
        return self._in_pixels(cut, side, pad, image)

    def _prepared(self, model: Any, image: np.ndarray) -> tuple[Tensor, bool]:
        """The image as the model takes it: padded to whole patches where it takes any size, resized to its own otherwise."""
        x = torch.from_numpy(image).to(model.device).permute(2, 0, 1)[None].float() / 255
        if isinstance(model, ViT):
            patch = model.config.patch_size
            return F.pad(model.normalise(x), (0, -x.shape[3] % patch, 0, -x.shape[2] % patch)), True
        return model.normalise(F.interpolate(x, size=model.image_size, mode="bilinear", antialias=True).clamp(0, 1)), False

    def _patches(self, model: Model, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Features [patches, channels] and their grid."""
        keys: list[Tensor] = []
        layers = [m for n, m in model.named_modules() if n.endswith("qkv") and isinstance(m, nn.Linear)]
        handle = layers[-1].register_forward_hook(lambda m, args, out: keys.append(out)) if layers else None
        try:
            read = trace(model, (image,), at=self.at or "*")
        finally:
            if handle is not None:
                handle.remove()
        found = [f for f in read.values() if f.grid is not None and len(f.grid) == 2 and f.grid[0] * f.grid[1] >= FEWEST_PATCHES]
        if not found:
            raise BadInput(type(model).__name__, expected=f"a tap on a grid of {FEWEST_PATCHES} patches or more", got="none")
        last: Feature = found[-1]
        grid, count = (last.grid[0], last.grid[1]), last.tokens.shape[1]  # type: ignore[index]
        whole = bool(keys) and keys[-1].ndim == 3 and keys[-1].shape[:2] == (1, count)
        if self.features == "keys" and not whole:
            raise BadInput(
                type(model).__name__, expected="a last attention layer that sees every patch", got="none", fix='features="tokens"'
            )
        if whole and self.features != "tokens":
            return keys[-1].chunk(3, -1)[1][0, last.prefix :], grid
        return last.tokens[0, last.prefix :], grid

    def _in_pixels(self, cut: Cut, side: tuple[float, float], padded: bool, image: np.ndarray) -> Discovery:
        height, width = image.shape[:2]
        if padded:
            patch = (round(side[0]), round(side[1]))
            box = cut.box(patch, (height, width))
            rough = np.kron(cut.mask, np.ones(patch, bool))[:height, :width]
        else:  # the model saw the image in its own size
            rows, columns = cut.mask.shape
            at = (np.arange(height) * rows // height, np.arange(width) * columns // width)
            rough = cut.mask[at[0]][:, at[1]]
            ys, xs = np.nonzero(rough)
            box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        if not self.refine:
            return Discovery(cut, box, rough, rough.astype(np.float64))
        soft, mask = refined(image, rough)
        return Discovery(cut, box, mask, soft.clip(0, 1))

    # many -------------------------------------------------------------------------------------------------------------

    def look(
        self,
        model: Model,
        data: Any,
        before: Model | None = None,
        snapshots: Mapping[int, Any] | None = None,
        others: Mapping[str, Model] | Sequence[Model] = (),
    ) -> Report:
        """The objects of some images. data: a Data, or samples as dicts with image (uint8 [height, width, 3]) and, where the truth is
        known, boxes (float [n, 4], x0 y0 x1 y1) and mask (bool [height, width]); or images alone. before: the model before fine-tuning,
        whose
        cut is shown beside. Raises BadInput where the model takes no images, or the data hold none."""
        if reason := self.needs(model):
            raise BadInput(f"TokenCut on {type(model).__name__}", expected="a model it can look into", got=reason)
        samples = _samples(data, self.samples)
        found = [self.discover(model, s["image"]) for s in samples]
        earlier = [self.discover(before, s["image"]) for s in samples[:8]] if before is not None else []
        numbers: dict[str, Any] = {
            "images": len(samples),
            "boxes": [list(d.box) for d in found],
            "share": float(np.mean([d.mask.mean() for d in found])),
            "tau": self.tau,
            **scores(samples, found),
        }
        if earlier:
            numbers["overlap_with_before"] = float(np.mean([overlap(a.mask, b.mask) for a, b in zip(found, earlier, strict=False)]))
        rows = [[s["id"], *d.box, round(float(d.mask.mean()), 3), round(d.cut.value, 5)] for s, d in zip(samples, found, strict=True)]
        tables = [Table(["image", "x0", "y0", "x1", "y1", "share of the image", "cut's eigenvalue"], rows, "The object of each image")]
        return Report(
            "Objects by normalised cut", _words(numbers), numbers, tables, {"What the cut finds": _figure(samples, found, earlier)}
        )


def refined(image: np.ndarray, mask: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """(soft, mask): a rough mask [height, width] smoothed along the image's edges, and its largest part above 0.5 with holes filled."""
    soft = bilateral_solve(image, mask, **options)
    parts, count = ndimage.label(ndimage.binary_fill_holes(soft > 0.5))
    if not count:
        return soft, np.ones_like(mask, dtype=bool)
    sizes = np.bincount(parts.ravel())
    # the authors take the second largest of all areas, background included: the object may cover more than half of the image
    return soft, parts == np.argsort(sizes, kind="stable")[-2]


# scores -------------------------------------------------------------------------------------------------------------


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, w) * max(0.0, h)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def max_f(soft: np.ndarray, truth: np.ndarray, beta2: float = 0.3) -> float:
    """The best F_beta of a soft map over 255 thresholds, as saliency papers have it."""
    best = 0.0
    for threshold in np.linspace(0, 1 - 1e-10, 255):
        chosen = soft >= threshold
        right = (chosen & truth).sum()
        if right:
            precision, recall = right / chosen.sum(), right / truth.sum()
            best = max(best, (1 + beta2) * precision * recall / (beta2 * precision + recall))
    return float(best)


def scores(samples: Sequence[Mapping[str, Any]], found: Sequence[Discovery]) -> dict[str, float]:
    """corloc: the share of images whose box overlaps a true one by half or more. iou, max_f, pixel_accuracy: of the masks.
    central_box_corloc:
    that of a box of half the image's sides in its middle, for comparison. Only of what truth there is."""
    out: dict[str, float] = {}
    boxed = [(s, d) for s, d in zip(samples, found, strict=True) if s.get("boxes") is not None and len(s["boxes"])]
    if boxed:
        out["corloc"] = float(np.mean([max(box_iou(d.box, b) for b in s["boxes"]) >= 0.5 for s, d in boxed]))
        middles = [(w / 4, h / 4, 3 * w / 4, 3 * h / 4) for h, w in (s["image"].shape[:2] for s, _ in boxed)]
        out["central_box_corloc"] = float(
            np.mean([max(box_iou(m, b) for b in s["boxes"]) >= 0.5 for m, (s, _) in zip(middles, boxed, strict=True)])
        )
    masked = [(np.asarray(s["mask"], bool), d) for s, d in zip(samples, found, strict=True) if s.get("mask") is not None]
    if masked:
        out["iou"] = float(np.mean([overlap(m, d.mask) for m, d in masked]))
        out["max_f"] = float(np.mean([max_f(d.soft, m) for m, d in masked]))
        out["pixel_accuracy"] = float(np.mean([(m == d.mask).mean() for m, d in masked]))
    return out


def _words(numbers: Mapping[str, Any]) -> list[str]:
    said = [f"The object found covers {numbers['share']:.0%} of an image, in the mean of {numbers['images']}."]
    if "corloc" in numbers:
        said.append(
            f"Its box overlaps a true one by half or more in {numbers['corloc']:.0%} of the images (CorLoc); a box in the middle does in "
            f"{numbers['central_box_corloc']:.0%}."
        )
    if "iou" in numbers:
        said.append(
            f"Its mask overlaps the true one by {numbers['iou']:.0%} (IoU), {numbers['pixel_accuracy']:.0%} of the pixels are right."
        )
    if "overlap_with_before" in numbers:
        said.append(f"Its masks overlap those of the model before by {numbers['overlap_with_before']:.0%}.")
    if numbers["share"] > 0.9:
        said.append(
            "The cut takes nearly all of the image: the features hold everything together; a larger tau, or center=True, separates more."
        )
    return said


# data ---------------------------------------------------------------------------------------------------------------


def _samples(data: Any, most: int) -> list[dict[str, Any]]:
    if isinstance(data, Data):
        data = data.splits.get("val", next(iter(data.splits.values())))
    if (isinstance(data, np.ndarray) and data.ndim == 3) or isinstance(data, Mapping):
        data = [data]
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise BadInput("data", expected="images, samples or Data", got=type(data).__name__)
    known = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    chosen = (
        [data[i * len(data) // most] if len(data) > most else data[i] for i in range(min(most, len(data)))] if known else [*data][:most]
    )
    out: list[dict[str, Any]] = []
    for item in chosen:
        for sample in _one_by_one(item):
            out.append({"id": f"image {len(out)}", **sample})
    if not out:
        raise BadInput("data", expected="one or more images", got="none")
    return out[:most]


def _one_by_one(item: Any) -> Iterable[dict[str, Any]]:
    """A raw sample as it is, an image as a sample, a batch of images in [0, 1] as its samples."""
    if not isinstance(item, Mapping):
        return [{"image": np.asarray(item)}]
    if "image" not in item:
        raise BadInput("a sample", expected="an image in it", got=f"{', '.join(map(str, item))}")
    if isinstance(item["image"], Tensor) and item["image"].ndim == 4:
        images = (item["image"].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        ids = item.get("id", [f"image {i}" for i in range(len(images))])
        return [{"image": image, "id": i} for image, i in zip(images, ids, strict=True)]
    return [dict(item)]


def sample_objects(count: int = 32, seed: int = 0) -> list[dict[str, Any]]:
    """Images with one textured ellipse on a coarser texture, and where it is: image uint8 [160, 208, 3], boxes float [1, 4], mask bool."""
    rng = np.random.default_rng(seed)
    return [{**_ellipse(rng), "id": f"ellipse {i}"} for i in range(count)]


def _ellipse(rng: np.random.Generator, height: int = 160, width: int = 208) -> dict[str, Any]:
    ys, xs = np.mgrid[:height, :width]
    ry, rx = rng.uniform(20, 60, 2)
    cy, cx = rng.uniform(ry, height - ry), rng.uniform(rx, width - rx)
    mask = ((ys - cy) / ry) ** 2 + ((xs - cx) / rx) ** 2 <= 1

    def grating(low: float, high: float) -> np.ndarray:
        frequency, angle = rng.uniform(low, high), rng.uniform(0, np.pi)
        wave = np.sin(2 * np.pi * frequency * (xs * np.cos(angle) + ys * np.sin(angle)) + rng.uniform(0, 6.28))
        return rng.uniform(60, 195, 3) + wave[..., None] * rng.uniform(20, 60, 3)

    image = np.where(mask[..., None], grating(0.08, 0.2), grating(0.01, 0.04)) + rng.normal(0, 8, (height, width, 3))
    rows, columns = np.nonzero(mask)
    box = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], np.float64)
    return {"image": image.clip(0, 255).astype(np.uint8), "boxes": box, "mask": mask}


def _figure(samples: Sequence[Mapping[str, Any]], found: Sequence[Discovery], earlier: Sequence[Discovery]) -> Figure:
    """Each image with its box and mask, and the eigenvector below it (and the mask of the model before, where there is one)."""
    shown, rows = min(8, len(samples)), 3 if earlier else 2
    figure = Figure(figsize=(2.1 * shown, 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, shown, squeeze=False)
    for i in range(shown):
        d, image = found[i], samples[i]["image"]
        grid[0, i].imshow(image)
        grid[0, i].contour(d.mask, levels=[0.5], colors=["#be123c"], linewidths=1)
        x0, y0, x1, y1 = d.box
        grid[0, i].plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="#0f766e", lw=1.4)
        grid[0, i].set_title(str(samples[i]["id"])[-18:], fontsize=7)
        grid[1, i].imshow(d.cut.vector, cmap="magma")
        if earlier and i < len(earlier):
            grid[2, i].imshow(image)
            grid[2, i].contour(earlier[i].mask, levels=[0.5], colors=["#6b7280"], linewidths=1)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure
