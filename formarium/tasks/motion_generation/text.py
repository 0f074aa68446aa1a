"""Captions as vectors without a trained text encoder: every word has a fixed random vector, a caption is their sum."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=20_000)
def _word(word: str, dim: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
    return np.random.RandomState(seed).standard_normal(dim)


def words(caption: str) -> list[str]:
    """Lower-case words of a caption."""
    return re.findall(r"[^\W_]+", caption.lower())


def word_vectors(captions: Sequence[str], dim: int) -> np.ndarray:
    """float32 [captions, dim], rows of length sqrt(dim): the sum of unit normal vectors that the words' hashes decide, the same on every
    machine.

    It knows which words are there, but neither their order nor what they mean: enough to tell the captions of the sample data apart. For
    captions in the wild give the model a trained encoder (`use_text_encoder`).
    """
    sums = np.stack([np.sum([_word(w, dim) for w in words(c)] or [np.zeros(dim)], 0) for c in captions])
    return (sums * np.sqrt(dim) / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-6)).astype(np.float32)
