"""Pictures of predictions: each image over the formula that was read in it, set anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from formarium.tasks.formula_recognition.latex import is_well_formed
from formarium.tasks.formula_recognition.metrics import edits, truth_words, truths

WIDTH, HEIGHT, CAPTION, PAD = 280, 76, 30, 12
INK, RIGHT, WRONG, RULE = (40, 44, 52), (0, 120, 100), (190, 60, 40), (225, 228, 232)


def draw(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = (), most: int = 16) -> Image.Image:
    """Up to 16 formulas: the image, what was read set by mathtext, its LaTeX; where the truth is known, the wrong ones say how far off."""
    count = min(most, len(prediction.latex))
    columns = 1 if count == 1 else 2 if count <= 8 else 4
    tile = 2 * HEIGHT + CAPTION
    lines = -(-count // columns)
    sheet = Image.new("RGB", (columns * (WIDTH + PAD) + PAD, lines * (tile + PAD) + PAD), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    true = truths([batch]) if "tokens" in batch else None
    for i in range(count):
        x, y = PAD + (i % columns) * (WIDTH + PAD), PAD + (i // columns) * (tile + PAD)
        inside = ~batch["mask"][i].cpu().numpy()
        h, w = int(inside.any(1).sum()), int(inside.any(0).sum())
        _paste(sheet, 255 - (batch["image"][i, 0, :h, :w].float().clamp(0, 1).cpu().numpy() * 255).astype(np.uint8), x, y)
        away = edits(prediction.ids[i], true[i]) if true else None
        _paste(sheet, _typeset(prediction.tokens[i]), x, y + HEIGHT)
        colour = INK if away is None else WRONG if away else RIGHT
        pen.text((x, y + 2 * HEIGHT), _short(prediction.latex[i] or "(nothing)"), colour, font)
        if away:
            truth = truth_words(batch, i, names)
            pen.text((x, y + 2 * HEIGHT + 14), _short(f"{away} off" + (f", is {truth}" if truth else "")), WRONG, font)
        pen.line((x, y + tile + 4, x + WIDTH, y + tile + 4), fill=RULE)
    return sheet


def _typeset(tokens: Sequence[str]) -> np.ndarray:
    from formarium.tasks.formula_recognition.sample import render

    if not is_well_formed(tokens):
        return np.full((HEIGHT // 2, WIDTH // 4), 255, dtype=np.uint8)
    try:
        return 255 - render([*tokens], dpi=140)
    except ValueError:  # a formula that mathtext has no rule for
        return np.full((HEIGHT // 2, WIDTH // 4), 255, dtype=np.uint8)


def _paste(sheet: Image.Image, image: np.ndarray, x: int, y: int) -> None:
    picture = Image.fromarray(image)
    scale = min(WIDTH / picture.width, (HEIGHT - 6) / picture.height, 2.0)
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BILINEAR)
    sheet.paste(picture.convert("RGB"), (x, y + (HEIGHT - picture.height) // 2))


def _short(text: str, most: int = 44) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def details(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The share of formulas read right by their length, as a figure by caption."""
    from matplotlib.figure import Figure

    said, true = [ids for p in predictions for ids in p.ids], truths(batches)
    lengths = np.array([len(t) for t in true])
    right = np.array([a == b for a, b in zip(said, true, strict=True)])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, 7)).astype(int))
    bins = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(0, len(edges) - 2))
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    shown = sorted({*bins.tolist()})
    axes.bar(range(len(shown)), [right[bins == b].mean() for b in shown], color="#2a9d8f")
    axes.set_xticks(range(len(shown)), [f"{lengths[bins == b].min()}-{lengths[bins == b].max()}" for b in shown])
    axes.set_ylim(0, 1)
    axes.set_xlabel("tokens")
    axes.set_ylabel("share right in every token")
    return {"Formulas read right, by length": figure}
