"""Lenses: each looks into any model whose features it can read."""
