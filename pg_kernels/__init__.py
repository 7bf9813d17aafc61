"""Fused PyTorch kernels for PaliGemma. `pg_kernels.model` is the model that is assembled from them."""

from typing import TYPE_CHECKING

from pg_kernels.lazy import lazy_names

if TYPE_CHECKING:
    from pg_kernels.api import *  # noqa: F403

__version__ = "0.1.0"
__getattr__, __dir__ = lazy_names(__name__)
