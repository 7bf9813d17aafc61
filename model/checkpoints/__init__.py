"""Checkpoints: Hugging Face folders and big_vision .npz files, read and written one tensor at a time."""
