"""Sample data with known truth: formulas of a small grammar, set by mathtext in several faces and bent as a hand would bend them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from formarium.errors import UnknownName
from formarium.task import Data, Sample
from formarium.tasks.formula_recognition.latex import SPECIAL, to_ids

ATOMS = ("a", "b", "x", "1", "2")
WORDS = (*ATOMS, "+", "-", "^", "_", "{", "}", r"\frac", r"\sqrt")
FACES = ("dejavusans", "cm", "stix", "stixsans")
COUNTS = {"train": 1600, "val": 200}
DPI, LONGEST = 140, 18


def formula(rng: np.random.Generator) -> list[str]:
    """Tokens of one or two terms, 18 tokens at most; a term is a symbol, one with a superscript or subscript, a fraction or a root, up to
    depth two."""
    out = term(rng, 2, bare=0.0)
    for _ in range(int(rng.integers(0, 2))):
        out += [str(rng.choice(["+", "-"])), *term(rng, 1)]
    return out if len(out) <= LONGEST else formula(rng)


def term(rng: np.random.Generator, depth: int, bare: float = 0.4) -> list[str]:
    """bare: how often it is a symbol alone."""
    shares = [bare, *(np.array([0.4, 0.25, 0.25, 0.1]) * (1 - bare))]
    kind = rng.choice(["symbol", "upper", "lower", "fraction", "root"], p=shares) if depth else "symbol"
    symbol = [str(rng.choice(ATOMS))]
    if kind == "upper":
        return [*symbol, "^", "{", *term(rng, 0), "}"]
    if kind == "lower":
        return [*symbol, "_", "{", *term(rng, 0), "}"]
    if kind == "fraction":
        return [r"\frac", "{", *term(rng, depth - 1), "}", "{", *term(rng, depth - 1), "}"]
    if kind == "root":
        return [r"\sqrt", "{", *term(rng, depth - 1), "}"]
    return symbol


@lru_cache(maxsize=1)
def _parser() -> Any:
    from matplotlib.mathtext import MathTextParser

    return MathTextParser("agg")


def render(tokens: list[str], face: str = "dejavusans", dpi: int = DPI) -> np.ndarray:
    """Bright ink on dark paper, uint8 [height, width]."""
    from matplotlib.font_manager import FontProperties

    text = "".join(t + " " if t.startswith("\\") else t for t in tokens)  # mathtext takes a space before _ for one to be set
    parsed = _parser().parse(f"${text}$", dpi=dpi, prop=FontProperties(size=12, math_fontfamily=face))
    return np.pad(np.asarray(parsed.image), 3)


def bend(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A slight turn, slant, stretch and a few specks: what tells two writings of one formula apart."""
    h, w = image.shape
    turn, slant, (sx, sy) = rng.normal(0, 0.02), rng.normal(0, 0.08), rng.uniform(0.9, 1.1, 2)
    width, height = int(w * sx) + 4, int(h * sy) + 4
    back = np.linalg.inv(np.array([[sx, slant], [turn, sy]]))
    shift = np.array([w, h]) / 2 - back @ (np.array([width, height]) / 2)
    picture = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, (*back[0], shift[0], *back[1], shift[1]), Image.Resampling.BILINEAR
    )
    noisy = np.asarray(picture, dtype=np.float32) * rng.uniform(0.75, 1.0)
    noisy[rng.random(noisy.shape) < 0.002] = 160
    return noisy.clip(0, 255).astype(np.uint8)


@dataclass
class Rendered:
    """Formulas of a seed, set when asked for and then kept."""

    seed: int
    split: str
    count: int
    formulas: list[list[str]] = field(init=False, repr=False)
    tokens: list[list[int]] = field(init=False, repr=False)
    _kept: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        rng = self._rng(0)
        self.formulas = [formula(rng) for _ in range(self.count)]
        self.tokens = [to_ids(f, WORDS) for f in self.formulas]

    def _rng(self, place: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, list(COUNTS).index(self.split), place))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index not in self._kept:
            rng = self._rng(index + 1)
            self._kept[index] = bend(render(self.formulas[index], str(rng.choice(FACES))), rng)
        return {"image": self._kept[index], "tokens": self.tokens[index], "id": f"{self.split}/{index:04d}"}


def sample(name: str, seed: int = 0) -> Data:
    """`formulas`: 1600 and 200 formulas of 13 words. Raises UnknownName for other names."""
    if name != "formulas":
        raise UnknownName("sample data set", name, ("formulas",))
    splits: dict[str, Any] = {split: Rendered(seed, split, count) for split, count in COUNTS.items()}
    return Data("formulas", "formula-recognition", splits, {"vocabulary": WORDS}, [*SPECIAL, *WORDS], source={"sample": name})
