"""Pictures of transcripts: the spectrum, when each token is heard, and what was said; and a table of confusions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, HIGH, STRIP, CAPTION, PAD = 460, 80, 12, 34, 10
INK, RIGHT, WRONG, FAINT = (40, 44, 52), (0, 120, 100), (190, 60, 40), (226, 230, 236)


def draw(prediction: Any, batch: Mapping[str, Any], most: int = 16) -> Image.Image:
    """Up to 16 utterances: log-mel spectrum (low tones at the bottom), a strip that darkens where a token is heard rather than the blank,
    and the transcript; where it is known, wrong ones say what was meant."""
    count = min(most, len(batch["id"]))
    columns = 2 if count > 1 else 1
    lines = -(-count // columns)
    tile = HIGH + STRIP + CAPTION + PAD
    sheet = Image.new("RGB", (columns * (WIDE + PAD) + PAD, lines * tile + PAD), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for i in range(count):
        x, y = PAD + (i % columns) * (WIDE + PAD), PAD + (i // columns) * tile
        size = max(1, int(batch["length"][i]))
        sheet.paste(_spectrum(batch["features"][i][:size].float().cpu().numpy()), (x, y))
        sheet.paste(_strip(1 - prediction.emissions[i][: int(prediction.frames[i]), 0].float().cpu().numpy()), (x, y + HIGH))
        said = prediction.text[i] or "(nothing)"
        if "text" not in batch:
            pen.text((x, y + HIGH + STRIP + 2), _short(said), INK, font)
            continue
        meant = batch["text"][i]
        right = said == meant
        pen.text((x, y + HIGH + STRIP + 2), _short(said), RIGHT if right else WRONG, font)
        if not right:
            pen.text((x, y + HIGH + STRIP + 17), _short(f"meant: {meant}"), INK, font)
    return sheet


def _spectrum(features: np.ndarray) -> Image.Image:
    values = np.clip((features.T[::-1] + 2) / 5, 0, 1)  # low tones below, from -2 to 3 deviations
    colours = np.stack([values**0.7 * 255, values**1.6 * 220, 70 + values * 60], -1)
    return Image.fromarray(colours.astype(np.uint8)).resize((WIDE, HIGH), Image.Resampling.BILINEAR)


def _strip(heard: np.ndarray) -> Image.Image:
    shades = (255 - np.clip(heard, 0, 1)[None] * 215).astype(np.uint8) if len(heard) else np.full((1, 1), 255, np.uint8)
    return Image.fromarray(shades).convert("RGB").resize((WIDE, STRIP), Image.Resampling.NEAREST)


def _short(text: str, most: int = 62) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def confusions(said: Sequence[str], meant: Sequence[str]) -> Counter[tuple[str, str]]:
    """(word meant, word heard) -> how often; "" on one side for a word that is missing or surplus."""
    found: Counter[tuple[str, str]] = Counter()
    for s, m in zip(said, meant, strict=True):
        a, b = m.split(), s.split()
        for kind, i, j, k, n in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
            if kind == "equal":
                continue
            for at in range(max(j - i, n - k)):
                found[(a[i + at] if i + at < j else "", b[k + at] if k + at < n else "")] += 1
    return found


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """The most frequent confusions as a figure, by caption; none where every word is right."""
    from matplotlib.figure import Figure

    said, meant = [t for p in predictions for t in p.text], [t for b in batches for t in b["text"]]
    worst = confusions(said, meant).most_common(15)
    if not worst:
        return {}
    figure = Figure(figsize=(6, 0.3 * len(worst) + 1), layout="constrained")
    axes = figure.subplots()
    names = [f"{m or '(nothing)'} \N{RIGHTWARDS ARROW} {s or '(nothing)'}" for (m, s), _ in worst]
    axes.barh(names[::-1], [n for _, n in worst][::-1], color="#00786480")
    axes.set_xlabel("times")
    return {"Words taken for others": figure}
