"""Wrong values that people pass as arguments by mistake."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from calls import Draw
from torch import Tensor

from pg_kernels import PackedInt8Weight, pack_int8

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
)
NUMBERS = (0, 1, -1, 2, 3, 2**31, 2**62, 2**63, 10**400, 0.5, -1.0, 1e308, 1e-320, float("inf"), float("nan"), 1j)
OTHERS = (None, True, False, "", "x", "1", [], [1], (), {}, object(), b"x", torch.float32)


def damaged(value: Any, draw: Draw) -> Any:
    """Return another value, of the same kind or of another."""
    if draw.chance(0.2):
        return draw.choice((*OTHERS, *NUMBERS))
    if isinstance(value, Tensor):
        return _tensor(value, draw)
    if isinstance(value, PackedInt8Weight):
        n, k = value.shape
        other = pack_int8(torch.ones(n + 1, k, dtype=torch.int8), torch.ones(n + 1))
        wider = pack_int8(torch.ones(n, k + 1, dtype=torch.int8), torch.ones(n))
        return draw.choice((other, wider, value.unpack(), value.unpack()[0], value.dequantize(), _meta(value)))
    if isinstance(value, list | tuple) and value:
        kind = draw.choice(("element", "element", "element", "one more", "one less", "tensor", "string"))
        if kind == "element":
            index = draw.integer(0, len(value) - 1)
            return type(value)(damaged(v, draw) if i == index else v for i, v in enumerate(value))
        return {"one more": [*value, value[0]], "one less": value[1:], "tensor": torch.ones(2), "string": "xy"}[kind]
    if isinstance(value, str):
        return draw.choice(("", "x", value.upper(), value + " ", "\ud800", 3, None))
    return draw.choice(
        (*NUMBERS, draw.tensor((), torch.float32), draw.tensor((2,), torch.float32), np.float32(0.5), np.int64(3))
    )


def _meta(weight: PackedInt8Weight) -> PackedInt8Weight:
    qweight, scale = weight.unpack()
    return pack_int8(qweight.to("meta"), scale.to("meta"))


def _tensor(value: Tensor, draw: Draw) -> Any:
    kind = draw.choice(("dtype", "dtype", "shape", "shape", "shape", "values", "layout", "kind"))
    if kind == "dtype":
        return value.to(draw.choice(DTYPES))
    if kind == "shape":
        return _shape(value, draw)
    if kind == "values":
        if value.is_floating_point():
            other = value.clone()
            other[..., :1] = draw.choice((float("nan"), float("inf"), -float("inf")))
            return other
        return torch.full_like(
            value, draw.choice((-1, 1, 127)) if value.dtype.itemsize == 1 else draw.choice((-1, -100, 2**31 - 1, 1000))
        )
    if kind == "layout":
        return _layout(value, draw)
    return draw.choice(
        (
            value.numpy(force=True) if value.dtype != torch.bfloat16 else [1.0],
            value.tolist(),
            [value],
            (value,),
            value.shape,
        )
    )


def _shape(value: Tensor, draw: Draw) -> Tensor:
    dim = draw.integer(0, max(value.dim() - 1, 0))
    choices = [
        value[None],
        value[..., None],
        value.flatten(),
        value.new_ones(()),
        value.new_ones(0),
        value.mT if value.dim() > 1 else value[None],
    ]
    if value.dim():
        choices += [value.narrow(dim, 0, 0), torch.cat((value, value.narrow(dim, 0, min(1, value.shape[dim]))), dim)]
        choices += [value.narrow(dim, 0, value.shape[dim] // 2), torch.cat((value, value), dim)]
    return draw.choice(choices)


def _layout(value: Tensor, draw: Draw) -> Any:
    kind = draw.choice(("coo", "csr", "quantised", "meta", "nested", "mkldnn", "conjugated"))
    try:
        if kind == "coo":
            return value.to_sparse()
        if kind == "csr":
            return value.to_sparse_csr()
        if kind == "quantised":
            return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)
        if kind == "nested":
            return torch.nested.nested_tensor(list(value))
        if kind == "mkldnn":
            return value.float().to_mkldnn()
        if kind == "conjugated":
            return torch.complex(value.float(), value.float()).conj().imag
    except (RuntimeError, ValueError, TypeError, IndexError):  # not for this tensor
        pass
    return value.to("meta")
