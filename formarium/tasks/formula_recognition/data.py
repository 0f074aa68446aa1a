"""Reading formulas that people have: images with a caption file, and CROHME's InkML.

folder/caption.txt, folder/img/name.bmp         a line `name token token ...` an image (as in BTTR, CoMER, PosFormer); img/ may be left out
folder/name.inkml                               strokes, with their truth as an annotation
folder/train/..., folder/val/...                either of these under splits (train, val, valid, validation, test, 2014, 2016, 2019)
Without splits a fifth is held out by the seed. A .zip of any of these is read as it is.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from formarium.errors import BadInput
from formarium.task import Data, Sample
from formarium.tasks.formula_recognition.inkml import draw_ink, read_inkml
from formarium.tasks.formula_recognition.latex import CROHME, SPECIAL, check_structure, to_ids, tokenize

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm")
LOW, HIGH = (16, 16), (256, 1024)  # the heights and widths that recognisers are trained on
_SPLITS = {"train": "train", "training": "train", **dict.fromkeys(("val", "valid", "validation", "2014"), "val")}
_SPLITS |= dict.fromkeys(("test", "2016", "2019"), "test")


def grey(image: Image.Image | np.ndarray, what: str) -> np.ndarray:
    """Bright ink on dark paper, uint8 [height, width], whichever was given: paper is what most pixels are.

    Raises BadInput for an image without pixels or without ink.
    """
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            clear = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        image = np.asarray(image.convert("L"))
    if not image.size:
        raise BadInput(what, expected="an image with pixels", got=f"{image.shape[0]}x{image.shape[1]}")
    if int(image.max()) - int(image.min()) < 8:
        raise BadInput(what, expected="ink on paper", got="an empty image: all pixels alike")
    middle = (int(image.max()) + int(image.min())) / 2
    return image if (image > middle).mean() <= 0.5 else 255 - image


def decode(source: Any, what: str) -> np.ndarray:
    """An image or InkML file (its path, or its bytes) as uint8 [height, width]. Raises BadInput where it can't be read."""
    if what.lower().endswith(".inkml"):
        return draw_ink(read_inkml(source, what))
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return grey(image, what)
    except BadInput:
        raise
    except Exception as e:
        raise BadInput(what, expected="an image that can be decoded", got=type(e).__name__) from None


@dataclass
class Formulas:
    """Images or ink by index, decoded when asked for and then kept: image uint8 [height, width], tokens (ids), id."""

    sources: list[Any]
    ids: list[str]
    tokens: list[list[int]] | None = None
    _kept: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Sample:
        if index not in self._kept:
            self._kept[index] = decode(self.sources[index], self.ids[index])
        sample: Sample = {"image": self._kept[index], "id": self.ids[index]}
        if self.tokens is not None:
            sample["tokens"] = self.tokens[index]
        return sample


def read(
    path: str | Path, *, strict: bool = False, vocabulary: str | Sequence[str] = "crohme", holdout: float = 0.2, seed: int = 0
) -> Data:
    """The formulas and splits of a folder or zip.

    vocabulary: "crohme" (110 tokens), "data" (those of the data), a dictionary file with one token a line, or the tokens.
    strict: fail on the first image or ink that can't be read, rather than leave it out and name it in `notes`.
    Raises BadInput: no such path, nothing to read, all of it broken, a caption whose braces don't balance, a token outside the vocabulary,
    a caption without its image.
    """
    root: Any = Path(path)
    if not root.exists():
        raise BadInput(str(path), expected="a folder or zip of formulas", got="no such path")
    if root.is_file():
        if not zipfile.is_zipfile(root):
            raise BadInput(str(path), expected="a folder or a zip", got="another file")
        root = zipfile.Path(root)
    root = _inside(root)
    given = {}
    for folder in _folders(root):
        if (split := _SPLITS.get(folder.name.lower())) and _holds_formulas(folder):
            given.setdefault(split, []).append(folder)
    notes: list[str] = []
    if "train" in given and len(given) > 1:
        found = {split: [s for f in folders for s in _scan(f, strict, notes)] for split, folders in given.items()}
    else:
        found = {"all": _scan(root, strict, notes)}
    empty = [split for split, samples in found.items() if not samples]
    if empty:
        raise BadInput(str(path), expected="formulas (caption.txt with images, or .inkml)", got=notes[0] if notes else "none in it")
    words = _vocabulary(vocabulary, found)
    splits = {}
    for split, samples in found.items():
        ids = [to_ids(tokens, words, name) for _, name, tokens in samples]
        splits[split] = Formulas([s[0] for s in samples], [s[1] for s in samples], ids)
    if "all" in splits:
        splits = _held_out(splits["all"], holdout, seed)
    elif "val" not in splits:
        splits["val"] = splits["test"]
    return Data(Path(path).stem, "formula-recognition", splits, {"vocabulary": words}, [*SPECIAL, *words], notes, {"path": str(path)})


def _vocabulary(asked: str | Sequence[str], found: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    if not isinstance(asked, str):
        return tuple(asked)
    if asked == "crohme":
        return CROHME
    if asked == "data":
        return tuple(sorted({t for samples in found.values() for _, _, tokens in samples for t in tokens}))
    if not Path(asked).is_file():
        raise BadInput("vocabulary", expected='"crohme", "data" or a file with one token a line', got=asked)
    return tuple(dict.fromkeys(w.strip() for w in Path(asked).read_text(encoding="utf-8").splitlines() if w.strip()))


def _held_out(every: Formulas, holdout: float, seed: int) -> dict[str, Formulas]:
    if len(every) < 2:
        raise BadInput("formulas", expected="at least two, one to train on and one to test on", got="one")
    order = np.random.default_rng(seed).permutation(len(every))
    count = min(len(every) - 1, max(1, round(holdout * len(every))))
    assert every.tokens is not None
    parts = {"train": sorted(order[count:]), "val": sorted(order[:count])}
    return {
        name: Formulas([every.sources[i] for i in at], [every.ids[i] for i in at], [every.tokens[i] for i in at])
        for name, at in parts.items()
    }


def _inside(root: Any) -> Any:
    """Past folders that hold nothing but one folder, as archives often do."""
    while True:
        entries = [e for e in root.iterdir() if not e.name.startswith((".", "__MACOSX"))]
        if len(entries) != 1 or not entries[0].is_dir() or entries[0].name.lower() in _SPLITS:
            return root
        root = entries[0]


def _folders(root: Any) -> list[Any]:
    return sorted((d for d in root.iterdir() if d.is_dir()), key=lambda d: d.name)


def _holds_formulas(folder: Any) -> bool:
    return any(f.name == "caption.txt" or f.name.lower().endswith(".inkml") for f in folder.iterdir())


def _source(file: Any) -> Any:
    return str(file) if isinstance(file, Path) else file.read_bytes()


def _scan(folder: Any, strict: bool, notes: list[str]) -> list[tuple[Any, str, list[str]]]:
    """(source, id, tokens) of every formula in a folder."""
    captions = folder / "caption.txt"
    found = _captioned(folder, captions) if captions.is_file() else _inks(folder)
    good, bad = [], []
    for source, name, tokens in found:
        try:
            if tokens is None:
                truth = read_inkml(source, name).truth
                if not truth:
                    raise BadInput(name, expected="an annotation of type truth", got="none")
                tokens = tokenize(truth, name)
            else:
                decode(source, name)
        except BadInput as e:
            if strict or not name.lower().endswith((".inkml", *IMAGES)):
                raise
            bad.append(str(e))
            continue
        good.append((source, name, tokens))
    if bad:
        notes.append(f"{len(bad)} left out: {'; '.join(bad[:3])}" + (f" and {len(bad) - 3} more" if len(bad) > 3 else ""))
    return good


def _captioned(folder: Any, captions: Any) -> list[tuple[Any, str, list[str] | None]]:
    images = folder / "img"
    images = images if images.is_dir() else folder
    files = {f.name: f for f in images.iterdir()}
    found: list[tuple[Any, str, list[str] | None]] = []
    for number, line in enumerate(captions.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, *tokens = line.split()
        what = f"{captions.name} line {number}"
        if not tokens:
            raise BadInput(what, expected="an image's name and its tokens", got=line.strip())
        if any(len(t) > 1 and not t.startswith("\\") for t in tokens):  # not tokenised yet
            tokens = tokenize(" ".join(tokens), what)
        check_structure(tokens, what)
        file = next((files[n] for n in (name, *(name + ending for ending in IMAGES)) if n in files), None)
        if file is None:
            raise BadInput(what, expected=f"an image called {name} beside it or in img/", got="none")
        found.append((_source(file), f"{folder.name}/{file.name}", tokens))
    return found


def _inks(folder: Any) -> list[tuple[Any, str, None]]:
    files = [f for f in folder.iterdir() if f.name.lower().endswith(".inkml")]
    return [(_source(f), f"{folder.name}/{f.name}", None) for f in sorted(files, key=lambda f: f.name)]


# unlabelled ---------------------------------------------------------------------------------------------------------


def inputs(paths: Sequence[str | Path]) -> Formulas:
    """Images and InkML files, and folders of them. BadInput for what isn't there or can't be read."""
    found: list[Path] = []
    for entry in map(Path, paths):
        if entry.is_dir():
            inside = [f for f in sorted(entry.rglob("*")) if f.suffix.lower() in (".inkml", *IMAGES)]
            if not inside:
                raise BadInput(str(entry), expected="a folder with images or .inkml", got="none in it")
            found += inside
        elif entry.is_file():
            found.append(entry)
        else:
            raise BadInput(str(entry), expected="an image, an .inkml file or a folder", got="no such path")
    if not found:
        raise BadInput("formulas", expected="at least one", got="none")
    files = Formulas([str(f) for f in found], [str(f) for f in found])
    files[0]  # a broken first file is said at once
    return files


def is_single(value: Any) -> bool:
    """Whether a value in memory is one formula's image, rather than several."""
    return isinstance(value, (Mapping, Image.Image)) or (hasattr(value, "ndim") and value.ndim in (2, 3))


def from_memory(value: Any, index: int) -> Sample:
    """A raw sample of an image in memory: a PIL image, or an array or tensor [height, width] or [height, width, 1 or 3] (or channels
    first)."""
    what = f"input {index}"
    if isinstance(value, Mapping):
        return {"id": what, **value}
    if isinstance(value, Image.Image):
        return {"id": what, "image": grey(value, what)}
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray) or value.ndim not in (2, 3):
        raise BadInput(what, expected="an image", got=type(value).__name__ if not hasattr(value, "shape") else f"{[*value.shape]}")
    if value.ndim == 3:
        value = value.mean(0 if value.shape[0] in (1, 3) else 2)
    if not np.isfinite(value).all():
        raise BadInput(what, expected="finite values", got="NaN or infinite ones")
    unit = value / 255 if value.max(initial=0) > 1 else value
    return {"id": what, "image": grey((np.clip(unit, 0, 1) * 255).round().astype(np.uint8), what)}


# batches ------------------------------------------------------------------------------------------------------------


@dataclass
class Prepare:
    """A raw sample to what a batch holds: scaled into the sizes recognisers know; in training scaled by chance before (recipe key `scale`).

    preprocessing: `low` and `high`, (height, width) limits. A recipe's `scale` is (smallest, largest) and `margin` the most blank pixels
    put around the image by chance.
    """

    preprocessing: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image, what = sample["image"], sample.get("id", "formula")
        low, high = self.preprocessing.get("low", LOW), self.preprocessing.get("high", HIGH)
        h, w = image.shape
        factor = 1.0
        if self.recipe and "scale" in self.recipe:
            factor = rng.uniform(*self.recipe["scale"])
        h, w = h * factor, w * factor
        shrink, grow = min(high[0] / h, high[1] / w), max(low[0] / h, low[1] / w)
        factor *= shrink if shrink < 1 else max(grow, 1.0)
        size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
        if 2 * size[0] < low[1] or 2 * size[1] < low[0] or size[0] > 4 * high[1] or size[1] > 4 * high[0]:
            raise BadInput(what, expected="a formula's proportions", got=f"{image.shape[1]}x{image.shape[0]} pixels")
        picture = Image.fromarray(image)
        if size != picture.size:
            picture = picture.resize(size, Image.Resampling.BILINEAR)
        ready = np.asarray(picture, dtype=np.float32) / 255
        if self.recipe and (margin := int(self.recipe.get("margin", 0))):
            ready = np.pad(ready, rng.integers(0, margin + 1, (2, 2)))
        return {**sample, "image": ready}


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents."""
    import torch

    from formarium.tasks.formula_recognition.model import pad_rows

    height, width = (max(s["image"].shape[i] for s in samples) for i in (0, 1))
    image = np.zeros((len(samples), 1, height, width), dtype=np.float32)
    mask = np.ones((len(samples), height, width), dtype=bool)
    for i, s in enumerate(samples):
        h, w = s["image"].shape
        image[i, 0, :h, :w] = s["image"]
        mask[i, :h, :w] = False
    batch: dict[str, Any] = {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask), "id": [s["id"] for s in samples]}
    if "tokens" in samples[0]:
        batch["tokens"] = pad_rows([[int(t) for t in s["tokens"]] for s in samples])
    return batch
