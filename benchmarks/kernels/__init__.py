"""Kernels compiled for GPUs that may be absent, and tile sizes tuned on GPUs that are present."""
