"""Arguments are addresses of contiguous memory on the CPU, where 0 means "not given", and sizes. See csrc/cpu/*.h."""

Int8Weight = tuple[int, int, int, int, int]
"""N, and the addresses of packed data, packed scales, bias (or 0) and output."""
TopK = tuple[int, float, int, int, int]
"""k, softcap (0 for none), and the addresses of values, indices and log_sums (or 0)."""
Heads = tuple[int, int, int, int, int]
"""A tensor [B, H, S, D] with contiguous rows: its address, H, and the strides of B, H and S in elements."""

def int8_linear(
    *,
    x: int,
    m: int,
    k: int,
    group: int,
    type: int,
    weights: list[Int8Weight],
    int8_activations: bool,
    geglu: bool,
    top: TopK | None,
) -> None: ...
def quantize_int8(*, n: int, k: int, group: int, type: int, weight: int, q: int, scale: int) -> None: ...
def pack_int8(*, n: int, k: int, group: int, q: int, scale: int, packed: int, packed_scale: int) -> None: ...
def unpack_int8(*, n: int, k: int, group: int, packed: int, packed_scale: int, q: int, scale: int) -> None: ...
def dequantize_rows(
    *, n: int, k: int, group: int, packed: int, packed_scale: int, indices: int, count: int, out: int
) -> None: ...
def rms_norm(
    *,
    x: int,
    residual: int,
    weight: int,
    y: int,
    total: int,
    rstd: int,
    rows: int,
    columns: int,
    type: int,
    weight_type: int,
    eps: float,
    offset: float,
) -> None: ...
def geglu(
    *,
    gate: int,
    up: int,
    grad: int = 0,
    y: int = 0,
    grad_gate: int = 0,
    grad_up: int = 0,
    count: int,
    type: int,
) -> None: ...
def rotary(
    *,
    q: Heads,
    k: Heads,
    v: Heads,
    q_out: Heads,
    k_cache: Heads,
    v_cache: Heads,
    positions: int,
    cache_positions: int,
    frequencies: int,
    batch: int,
    length: int,
    dim: int,
    type: int,
    cache_type: int,
) -> None: ...
def attention(
    *,
    q: Heads,
    k: Heads,
    v: Heads,
    out: Heads,
    prefix_ends: list[int],
    starts: list[int],
    ends: list[int],
    q_starts: list[int],
    queries: int,
    keys: int,
    dim: int,
    type: int,
    causal: bool,
    scale: float,
    softcap: float,
    window: int,
) -> None: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
