"""Methods: each changes a model, or how it trains."""
