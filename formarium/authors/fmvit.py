"""FMViT: github.com/tany0699/FMViT announces code and has none; no released weights exist, so every name maps to itself."""

from __future__ import annotations

from formarium.authors import Authors

authors = Authors()
