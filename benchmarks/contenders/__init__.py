"""The contenders: our backends, PyTorch and other packages."""
