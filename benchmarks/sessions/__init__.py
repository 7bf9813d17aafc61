"""End-to-end runs in separate processes: from a checkpoint on disk to the last token, and training with transformers."""
