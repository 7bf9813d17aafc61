"""What the modules read from transformers' configurations."""

from __future__ import annotations

from typing import Any


def is_gemma2(config: Any) -> bool:
    """Return whether a configuration is Gemma 2's. Raises ValueError for models other than Gemma 1 and 2, whose layers differ."""
    if config.model_type not in ("gemma", "gemma2"):
        raise ValueError(f"config: model_type is {config.model_type!r}, supported are 'gemma' and 'gemma2'")
    return config.model_type == "gemma2"
