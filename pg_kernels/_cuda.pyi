"""Arguments are addresses of contiguous memory on a device, where 0 means "not given", and sizes. See csrc/cuda/int8_linear.h."""

Weight = tuple[int, int, int, int, int]
"""N, and the addresses of packed data, scales, bias (or 0) and output."""

def int8_linear(
    *,
    x: int,
    row_scale: int,
    m: int,
    k: int,
    group: int,
    x_type: int,
    bias_type: int,
    y_type: int,
    weights: list[Weight],
    int8_activations: bool,
    geglu: bool,
    num_splits: int,
    partial: int,
    device: int,
    stream: int,
) -> None: ...
def num_splits(
    *, m: int, k: int, group: int, int8_activations: bool, geglu: bool, sizes: list[int], device: int
) -> int: ...
def quantize_rows(*, x: int, type: int, m: int, k: int, q: int, scale: int, device: int, stream: int) -> None: ...
def dequantize(
    *, data: int, scale: int, n: int, k: int, group: int, out: int, type: int, device: int, stream: int
) -> None: ...
def dequantize_rows(
    *,
    data: int,
    scale: int,
    indices: int,
    count: int,
    n: int,
    k: int,
    group: int,
    out: int,
    type: int,
    device: int,
    stream: int,
) -> None: ...
