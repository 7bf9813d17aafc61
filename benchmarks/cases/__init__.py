"""What is measured: the cases, the ops' inputs and plain PyTorch definitions, and models with random weights."""
