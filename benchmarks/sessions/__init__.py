"""Whole runs in processes of their own: from a checkpoint on disk to the last token, and training with transformers."""
