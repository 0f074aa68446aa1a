"""Hot operations: a clear PyTorch version is the specification, a faster path must equal it in tests."""
