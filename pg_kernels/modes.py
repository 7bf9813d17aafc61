"""The modes of `quantize_`. This module does not import torch."""

ACTIVATIONS = {"int8": "keep", "int8-dynamic": "int8"}
"""`int8_linear`'s argument `activations` for each mode."""
