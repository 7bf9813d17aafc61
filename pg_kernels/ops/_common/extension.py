"""The C++ extensions `pg_kernels._C` (CPUs) and `pg_kernels._cuda`, either of which may be missing, and their arguments."""

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
"""The largest head dimension of the CPU extension's attention and rotary kernels: kMaxDim in csrc/cpu/token_ops_impl.h."""
FLOAT_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""How the extensions number dtypes."""


def unavailable_reason(device_type: str) -> str | None:
    """Return why the CPU extension cannot run on tensors of a device type on this machine, or None if it can."""
    if _C is None:
        return _UNAVAILABLE
    return None if device_type == "cpu" else "the C++ extension has no kernels for it"


def unavailable_reason_cpu_or_cuda(device_type: str) -> str | None:
    """Return why an op with kernels in both extensions cannot run on tensors of a device type, or None if it can."""
    if device_type != "cuda":
        return unavailable_reason(device_type)
    if _cuda is None:
        return _UNAVAILABLE_CUDA
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    capability = torch.cuda.get_device_capability()
    return None if capability >= (8, 0) else f"needs compute capability (8, 0), this GPU has {capability}"


# torch.compile treats the result as a constant, as for devices.unavailable_reason.
unavailable_reason_cpu_or_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


def instruction_sets() -> tuple[str, list[str]]:
    """Return the instruction set that the kernels use, and all that this CPU has, best first. Empty without the extension.

    Raises ValueError if PG_KERNELS_ISA names an instruction set that the CPU does not have.
    """
    return ("", []) if _C is None else (_C.instruction_set(), _C.instruction_sets())


def unsupported_reason(*tensors: Tensor | None) -> str | None:
    """Return why the extensions do not support these tensors' dtypes, or None if they do."""
    if any(tensor is not None and tensor.dtype not in FLOAT_CODES for tensor in tensors):
        return "float64 runs on backend 'reference' only"
    return None


def check(**tensors: Tensor) -> None:
    """Raise TypeError or ValueError unless every tensor is dense, on the CPU and of a dtype in FLOAT_CODES."""
    for name, tensor in tensors.items():
        checks.check_tensor(**{name: tensor})  # PyTorch's dispatcher lets None through
        if tensor.dtype not in FLOAT_CODES:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
        if not tensor.is_cpu:
            raise ValueError(f"{name}: expected a tensor on the CPU, got one on {tensor.device}")


def heads(tensor: Tensor) -> tuple[int, int, int, int, int]:
    """Return address, H and the strides over B, H and S of a tensor [B, H, S, D] with contiguous rows, for the CPU extension."""
    batch, head, token, _ = tensor.stride()
    return tensor.data_ptr(), tensor.shape[1], batch, head, token
