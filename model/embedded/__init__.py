"""The built-in model: its weights, and the world, tasks and stages that it was trained with."""

from pathlib import Path

EMBEDDED_CHECKPOINT = Path(__file__).parent
"""Folder of the small trained PaliGemma that comes with the package; it names and finds emoji."""
