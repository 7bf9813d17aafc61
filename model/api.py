"""All public names of pg_kernels.model."""

from .config import PaliGemmaConfig, TextConfig, VisionConfig
from .embedded import EMBEDDED_CHECKPOINT
from .paligemma import PaliGemma, PaliGemmaOutput
from .processor import Processor

__all__ = [
    "EMBEDDED_CHECKPOINT",
    "PaliGemma",
    "PaliGemmaConfig",
    "PaliGemmaOutput",
    "Processor",
    "TextConfig",
    "VisionConfig",
]
