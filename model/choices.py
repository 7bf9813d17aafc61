"""The names that options choose from. This module does not import torch."""

RESIZE_MODES = ("hf", "big_vision", "big_vision_no_antialias")
GRAMMARS = ("detect", "segment")
DTYPES = ("float32", "bfloat16", "float16")
