"""The C++ extensions `pg_kernels._C` and, for CUDA, `pg_kernels._cuda`, which may be missing, and how tensors go into them."""

from __future__ import annotations

from importlib import util

import torch
from torch import Tensor

from pg_kernels.ops._common import checks


def _unavailable_reason(module: str, compiler: str, error: ImportError) -> str:
    if util.find_spec(module) is None:
        return f"{module} is not built: pip found no {compiler} when it installed the package"
    return f"{module} is built, but cannot be loaded ({error})"


try:
    from pg_kernels import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _UNAVAILABLE = _unavailable_reason("pg_kernels._C", "C++ compiler", error)

try:
    from pg_kernels import _cuda
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    _UNAVAILABLE_CUDA = _unavailable_reason("pg_kernels._cuda", "GPU or no nvcc", error)

LONGEST_HEAD = 256
"""Head dimension that its attention and rotary kernels have room for: kMaxDim in csrc/cpu/token_ops_impl.h."""
FLOAT_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def unavailable_reason(device_type: str) -> str | None:
    """Why the extension's kernels cannot run on tensors of a device type here, or None when they can."""
    if _C is None:
        return _UNAVAILABLE
    return None if device_type == "cpu" else "the C++ extension has no kernels for it"


def unavailable_reason_cpu_or_cuda(device_type: str) -> str | None:
    """The same for ops that have kernels for both."""
    if device_type != "cuda":
        return unavailable_reason(device_type)
    if _cuda is None:
        return _UNAVAILABLE_CUDA
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    capability = torch.cuda.get_device_capability()
    return None if capability >= (8, 0) else f"needs compute capability (8, 0), this GPU has {capability}"


# As in launch.py: torch.compile takes the answer as a constant.
unavailable_reason_cpu_or_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


def instruction_sets() -> tuple[str, list[str]]:
    """The CPU's instruction set that the kernels use, and all that it has, the best first; empty without the extension.

    Raises ValueError when PG_KERNELS_ISA names one that it does not have.
    """
    return ("", []) if _C is None else (_C.instruction_set(), _C.instruction_sets())


def unsupported_reason(*tensors: Tensor | None) -> str | None:
    """Why the extension's kernels cannot take these tensors, or None when they can."""
    if any(tensor is not None and tensor.dtype not in FLOAT_CODES for tensor in tensors):
        return "float64 runs on backend 'reference' only"
    return None


def check(**tensors: Tensor) -> None:
    """Raise TypeError or ValueError unless every tensor is one whose address the kernels for CPUs can take."""
    for name, tensor in tensors.items():
        checks.check_tensor(**{name: tensor})  # the dispatcher lets None through
        if tensor.dtype not in FLOAT_CODES:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
        if not tensor.is_cpu:
            raise ValueError(f"{name}: expected a tensor on the CPU, got one on {tensor.device}")


def heads(tensor: Tensor) -> tuple[int, int, int, int, int]:
    """A tensor [B, H, S, D] with contiguous rows, as the extension takes it."""
    batch, head, token, _ = tensor.stride()
    return tensor.data_ptr(), tensor.shape[1], batch, head, token
