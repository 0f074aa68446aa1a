"""Expression recognition rates, predictions as rows, and the trivial rival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from formarium.task import Data
from formarium.tasks.formula_recognition.latex import PAD, is_well_formed, skeleton


def edits(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Tokens to insert, delete or change to get from one sequence to the other (Levenshtein)."""
    before = np.arange(len(b) + 1)
    for i, token in enumerate(a, 1):
        changed = before[:-1] + np.array([token != other for other in b], dtype=int)
        best = np.concatenate([[i], np.minimum(changed, before[1:] + 1)])
        before = np.minimum.accumulate(best - np.arange(len(b) + 1)) + np.arange(len(b) + 1)  # insertions run to the right
    return int(before[-1])


def truths(batches: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    return [[t for t in row if t != PAD] for b in batches for row in b["tokens"].tolist()]


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """exprate (share of formulas that are right in every token), exprate_1 and exprate_2 (at most one, two token edits away),
    token_error_rate
    (edits over true tokens), well_formed (share that LaTeX can set). All but the fourth come with one value a sample."""
    said, true = [ids for p in predictions for ids in p.ids], truths(batches)
    words = [tokens for p in predictions for tokens in p.tokens]
    away = np.array([edits(a, b) for a, b in zip(said, true, strict=True)], dtype=np.float64)
    per_sample = {
        "exprate": (away == 0).astype(np.float64),
        "exprate_1": (away <= 1).astype(np.float64),
        "exprate_2": (away <= 2).astype(np.float64),
        "well_formed": np.array([is_well_formed(t) for t in words], dtype=np.float64),
    }
    metrics = {name: float(values.mean()) for name, values in per_sample.items()}
    metrics["token_error_rate"] = float(away.sum() / max(1, sum(map(len, true))))
    return metrics, per_sample


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a sample: id, latex, score (log-probability a token, both directions), well_formed; the truth where names give it words."""
    out = []
    for i, (latex, tokens) in enumerate(zip(prediction.latex, prediction.tokens, strict=True)):
        row = {"id": (batch.get("id") or [str(j) for j in range(len(prediction.latex))])[i], "latex": latex}
        row |= {
            "score": round(float(prediction.score[i]), 4),
            "well_formed": is_well_formed(tokens),
            "structure": " ".join(skeleton(tokens)),
        }
        if "tokens" in batch and (true := truth_words(batch, i, names)) is not None:
            row["truth"] = true
        out.append(row)
    return out


def truth_words(batch: Mapping[str, Any], i: int, names: Sequence[str]) -> str | None:
    """The i-th truth as text, where every token has a name."""
    ids = [t for t in batch["tokens"][i].tolist() if t != PAD]
    return " ".join(names[t] for t in ids) if ids and max(ids) < len(names) else None


def baseline(data: Data, seed: int = 0, size: tuple[int, int] = (20, 40), most: int = 3000) -> tuple[str, dict[str, float]]:
    """The formula of the nearest training image (both stretched to 20x40 pixels), scored on "val"."""
    from PIL import Image
    from sklearn.neighbors import NearestNeighbors

    def pixels(dataset: Any, chosen: Sequence[int]) -> np.ndarray:
        pictures = [Image.fromarray(dataset[int(i)]["image"]).resize(size[::-1], Image.Resampling.BILINEAR) for i in chosen]
        return np.stack([np.asarray(p, dtype=np.float32).ravel() / 255 for p in pictures])

    train, val = data.splits["train"], data.splits["val"]
    chosen = np.random.default_rng(seed).permutation(len(train))[:most]
    nearest = NearestNeighbors(n_neighbors=1).fit(pixels(train, chosen))
    found = nearest.kneighbors(pixels(val, range(len(val))), return_distance=False)[:, 0]
    away = np.array([edits(train[int(chosen[j])]["tokens"], val[i]["tokens"]) for i, j in enumerate(found)])
    rates = {"exprate": (away == 0).mean(), "exprate_1": (away <= 1).mean(), "exprate_2": (away <= 2).mean()}
    return "the formula of the nearest training image", {k: float(v) for k, v in rates.items()}
