"""Kernels compiled for GPUs that need not be here, and tile sizes tuned on GPUs that are."""
