"""Who takes part: our backends, PyTorch and other packages."""
