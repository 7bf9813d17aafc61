"""The kernels under transformers: an attention implementation, and replaced forwards in live models."""

from pg_kernels.integrations.transformers.attention import NAME, register
from pg_kernels.integrations.transformers.patch import apply_to_paligemma, patch, unpatch

__all__ = ["NAME", "apply_to_paligemma", "patch", "register", "unpatch"]
