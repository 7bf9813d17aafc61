"""PaliGemma 1 and 2 assembled from the kernels."""

from typing import TYPE_CHECKING

from pg_kernels.lazy import lazy_names

from .embedded import EMBEDDED_CHECKPOINT as EMBEDDED_CHECKPOINT

if TYPE_CHECKING:
    from .api import *  # noqa: F403

__getattr__, __dir__ = lazy_names(__name__)
