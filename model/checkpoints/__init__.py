"""Checkpoints: Hugging Face folders and big_vision .npz files, read and written one tensor at a time."""

from .conversion import convert
from .loading import load
from .saving import save_big_vision, save_huggingface

__all__ = ["convert", "load", "save_big_vision", "save_huggingface"]
