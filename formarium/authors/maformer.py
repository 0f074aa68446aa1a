"""MAFormer: no code and no weights are public, so every name maps to itself."""

from __future__ import annotations

from formarium.authors import Authors

authors = Authors()
