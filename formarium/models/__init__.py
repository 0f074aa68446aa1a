"""Models by domain. A model never imports another; what two share is in `nn/`."""
