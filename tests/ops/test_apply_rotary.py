from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import (
    DTYPES,
    assert_accurate,
    assert_any_layout,
    assert_compiles,
    assert_frozen_inputs,
    assert_pure,
    assert_same,
    assert_within,
    leaves,
    needs_extension,
    one_rounding,
    randn,
    run,
    shifted,
)
from torch import Tensor

from pg_kernels import apply_rotary, apply_rotary_to_cache
from pg_kernels import backend as use_backend

OP = "apply_rotary"


def definition(q: Tensor, k: Tensor, positions: Tensor, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Rotate the complex numbers x[i] + √−1 · x[i + D/2] by the angles position · theta^(−2i/D)."""
    half = q.shape[-1] // 2
    wide = torch.promote_types(q.dtype, torch.float32)
    frequencies = 1.0 / theta ** (torch.arange(half, dtype=wide, device=q.device) / half)
    angles = positions.to(wide)[..., None] * frequencies
    if positions.dim() == 2:
        angles = angles[:, None]
    rotation = torch.polar(torch.ones_like(angles), angles)

    def rotate(x: Tensor) -> Tensor:
        # PyTorch has complex numbers in fp32 and fp64 only. Write the product out for lower precisions.
        if x.dtype in (torch.float32, torch.float64):
            rotated = torch.complex(x[..., :half], x[..., half:]) * rotation.to(x.dtype.to_complex())
            return torch.cat((rotated.real, rotated.imag), dim=-1)
        cos, sin = rotation.real.to(x.dtype), rotation.imag.to(x.dtype)
        return torch.cat((x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin), dim=-1)

    return rotate(q), rotate(k)


def queries_and_keys(
    device: str, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, length: int = 5, dim: int = 16
) -> list[Tensor]:
    return [randn(batch, heads, length, dim, device=device), randn(batch, kv_heads, length, dim, device=device)]


@pytest.mark.parametrize("theta", [10_000.0, 100.0])
@pytest.mark.parametrize("per_example", [False, True], ids=["shared", "per_example"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"dim": 256, "heads": 8, "kv_heads": 1},
        {"dim": 2},
        {"dim": 72, "heads": 3, "kv_heads": 3},
        {"length": 1},
        {"length": 129, "dim": 64, "heads": 1, "kv_heads": 1},
        {"batch": 0},
        {"length": 0},
        {"kv_heads": 0},
    ],
    ids=str,
)
def test_values_and_gradients(
    device: str, backend: str, dtype: torch.dtype, sizes: dict[str, int], per_example: bool, theta: float
) -> None:
    q, k = queries_and_keys(device, **sizes)
    batch, _, length, _ = q.shape
    positions = torch.randint(0, 300, (batch, length) if per_example else (length,), device=device)
    assert_accurate(
        lambda q, k: apply_rotary(q, k, positions, theta=theta),
        lambda q, k: definition(q, k, positions, theta),
        [q, k],
        dtype,
    )


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_far_positions(device: str, backend: str, integers: torch.dtype) -> None:
    """fp32 represents an angle of 8191 radians to 2⁻¹¹."""
    q, k = queries_and_keys(device)
    positions = torch.tensor([0, 1, 4096, 8190, 8191], device=device, dtype=integers)
    for actual, expected in zip(
        apply_rotary(q, k, positions), definition(q.double(), k.double(), positions), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=5e-3)


def test_position_zero_changes_nothing(device: str, backend: str, dtype: torch.dtype) -> None:
    q, k = (tensor.to(dtype) for tensor in queries_and_keys(device))
    rotated = apply_rotary(q, k, torch.zeros(5, dtype=torch.int64, device=device))
    torch.testing.assert_close(rotated, (q, k), rtol=0, atol=0)


def test_negative_positions_rotate_back(device: str, backend: str) -> None:
    q, k = queries_and_keys(device)
    positions = torch.randint(0, 200, (2, 5), device=device)
    torch.testing.assert_close(apply_rotary(*apply_rotary(q, k, positions), -positions), (q, k), rtol=1e-4, atol=1e-4)


def test_scores_depend_on_distance_only(device: str, backend: str) -> None:
    q, k = queries_and_keys(device, kv_heads=4)
    positions = torch.tensor([3, 0, 17, 40, 5], device=device)

    def scores(shift: int) -> Tensor:
        rotated_q, rotated_k = apply_rotary(q, k, positions + shift)
        return rotated_q @ rotated_k.mT

    torch.testing.assert_close(scores(100), scores(0), rtol=1e-3, atol=1e-3)
    rotated_q, _ = apply_rotary(q, k, positions)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1))


def test_shared_and_expanded_positions_agree(device: str, backend: str) -> None:
    q, k = queries_and_keys(device)
    positions = torch.arange(10, device=device)[::2]
    expected = apply_rotary(q, k, positions.contiguous())
    for same in (
        positions,
        positions[None].expand(2, 5),
        positions[None].repeat(2, 1),
        positions[:, None].repeat(1, 2).T,
    ):
        torch.testing.assert_close(apply_rotary(q, k, same), expected, rtol=0, atol=0)


def test_any_layout(device: str, backend: str) -> None:
    positions = torch.arange(5, device=device)
    assert_any_layout(lambda q, k: apply_rotary(q, k, positions), queries_and_keys(device))


def test_heads_split_from_a_projection(device: str, backend: str) -> None:
    """A model views a projection [B, S, H·D] as heads [B, H, S, D]."""
    rows = [randn(2, 5, 4 * 16, device=device), randn(2, 5, 2 * 16, device=device)]
    positions = torch.arange(5, device=device)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 16)).transpose(1, 2)

    assert_same(
        run(lambda q, k: apply_rotary(split(q), split(k), positions), rows),
        run(lambda q, k: apply_rotary(split(q).contiguous(), split(k).contiguous(), positions), rows),
    )


def test_one_tensor_in_two_places(device: str, backend: str) -> None:
    q, _ = queries_and_keys(device)
    positions = torch.arange(5, device=device)
    assert_same(
        run(lambda q: apply_rotary(q, q, positions), [q]), run(lambda q: apply_rotary(q, q.clone(), positions), [q])
    )


def test_pure(device: str, backend: str) -> None:
    positions = torch.arange(5, device=device)
    assert_pure(lambda q, k: apply_rotary(q, k, positions), queries_and_keys(device))


def test_frozen_inputs(device: str, backend: str) -> None:
    positions = torch.arange(5, device=device)
    q, k = queries_and_keys(device)
    assert_frozen_inputs(lambda q: apply_rotary(q, k, positions)[0], [q])
    assert_frozen_inputs(lambda k: apply_rotary(q, k, positions)[1], [k])


def test_gradients_with_only_one_output_used(device: str, backend: str) -> None:
    q, k = (tensor.requires_grad_() for tensor in queries_and_keys(device))
    apply_rotary(q, k, torch.arange(5, device=device))[1].sum().backward()
    assert k.grad is not None and k.grad.any()
    assert q.grad is None or not q.grad.any()


def test_autocast_changes_nothing(device: str, backend: str, dtype: torch.dtype) -> None:
    q, k = (tensor.to(dtype) for tensor in queries_and_keys(device))
    positions = torch.arange(300, 305, device=device)
    expected = apply_rotary(q, k, positions)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(apply_rotary(q, k, positions), expected, rtol=0, atol=0)


def test_compiles(device: str, backend: str) -> None:
    positions = torch.arange(5, device=device)
    assert_compiles(lambda q, k: apply_rotary(q, k, positions), queries_and_keys(device))
    assert_compiles(lambda q, k: apply_rotary(q, k, positions.expand(2, 5), theta=100.0), queries_and_keys(device))


@pytest.mark.parametrize("sizes", [{}, {"batch": 0}, {"length": 1, "dim": 2}], ids=str)
def test_opcheck(device: str, backend: str, sizes: dict[str, int]) -> None:
    q, k = leaves(*queries_and_keys(device, **sizes))
    assert q is not None
    for batch in {1, q.shape[0]}:
        positions = torch.arange(q.shape[2], device=device).expand(batch, -1).contiguous()
        if backend == "reference":
            torch.library.opcheck(torch.ops.pg_kernels.apply_rotary.default, (q, k, positions, 10_000.0))
        else:
            for inverse in (False, True):
                torch.library.opcheck(
                    torch.ops.pg_kernels.apply_rotary_triton.default, (q, k, positions, 10_000.0, inverse)
                )


def test_gradcheck_of_the_reference() -> None:
    q, k = (tensor.double().requires_grad_() for tensor in queries_and_keys("cpu", length=3, dim=4))
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda q, k: apply_rotary(q, k, torch.tensor([7, 0, 2])), (q, k))


Q, K, POSITIONS = torch.ones(2, 4, 3, 8), torch.ones(2, 1, 3, 8), torch.arange(3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q.int()}, TypeError, r"^q: expected float32, float16 or bfloat16, got torch.int32"),
        ({"q": None}, TypeError, r"^q: expected a tensor, got NoneType"),
        ({"k": None}, TypeError, r"^k: expected a tensor, got NoneType"),
        ({"k": K.half()}, TypeError, r"^k: has dtype torch.float16, but q has torch.float32"),
        ({"positions": POSITIONS.float()}, TypeError, r"^positions: expected int32 or int64, got torch.float32"),
        ({"positions": [0, 1, 2]}, TypeError, r"^positions: expected a tensor, got list"),
        ({"positions": None}, TypeError, r"^positions: expected a tensor, got NoneType"),
        ({"q": torch.ones(4, 3, 8)}, ValueError, r"^q: expected shape \[B, H, S, D\], got \[4, 3, 8\]"),
        ({"q": Q[..., :7], "k": K[..., :7]}, ValueError, r"^q: the head dimension must be even, got 7"),
        ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, r"^q: the head dimension must be .*, got 0"),
        ({"k": K[:1]}, ValueError, r"^k: expected shape \[2, Hkv, 3, 8\] .*, got \[1, 1, 3, 8\]"),
        ({"k": K[:, :, :2]}, ValueError, r"^k: expected shape \[2, Hkv, 3, 8\] .*, got \[2, 1, 2, 8\]"),
        ({"k": K[..., :4]}, ValueError, r"^k: expected shape \[2, Hkv, 3, 8\] .*, got \[2, 1, 3, 4\]"),
        ({"positions": POSITIONS[:2]}, ValueError, r"^positions: expected shape \[3\] .*, got \[2\]"),
        ({"positions": POSITIONS[None]}, ValueError, r"^positions: expected shape \[2, 3\] .*, got \[1, 3\]"),
        ({"positions": POSITIONS[0]}, ValueError, r"^positions: expected shape \[2, 3\] .*, got \[\]"),
        ({"positions": POSITIONS.to("meta")}, ValueError, r"^positions: is on meta, but q is on cpu"),
        ({"theta": 0.0}, ValueError, r"^theta: expected a positive number, got 0.0"),
    ],
)
def test_errors(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apply_rotary(**{"q": Q, "k": K, "positions": POSITIONS, **change})


# --- apply_rotary_to_cache


def cache_inputs(device: str, dtype: torch.dtype = torch.float32, **sizes: int) -> list[Tensor]:
    """Draw q, k, v, positions, two filled caches of capacity 9, and different cache_positions for each example."""
    q, k = (tensor.to(dtype) for tensor in queries_and_keys(device, **sizes))
    batch, kv_heads, length, dim = k.shape
    positions = torch.randint(0, 300, (batch, length), device=device)
    caches = [randn(batch, kv_heads, 9, dim, device=device, dtype=dtype) for _ in range(2)]
    cache_positions = torch.stack([torch.randperm(9)[:length] for _ in range(batch)]).to(device)
    return [q, k, randn(*k.shape, device=device, dtype=dtype), positions, *caches, cache_positions]


def written(cache: Tensor, new: Tensor, cache_positions: Tensor) -> Tensor:
    """Return the cache after writing one token at a time."""
    cache = cache.clone()
    for row in range(len(cache_positions)):
        for token in range(cache_positions.shape[1]):
            cache[row, :, cache_positions[row, token]] = new[row, :, token].to(cache.dtype)
    return cache


@pytest.mark.parametrize(
    "sizes",
    [{}, {"dim": 72, "heads": 3, "kv_heads": 3}, {"dim": 256, "heads": 8, "kv_heads": 1}, {"length": 1}],
    ids=str,
)
def test_cache_takes_keys_and_values(device: str, backend: str, dtype: torch.dtype, sizes: dict[str, int]) -> None:
    q, k, v, positions, k_cache, v_cache, cache_positions = cache_inputs(device, dtype, **sizes)
    rotated_q, rotated_k = apply_rotary(q, k, positions)
    expected = written(k_cache, rotated_k, cache_positions), written(v_cache, v, cache_positions)
    out = apply_rotary_to_cache(q, k, v, positions, k_cache, v_cache, cache_positions)
    torch.testing.assert_close((out, k_cache, v_cache), (rotated_q, *expected), rtol=0, atol=0)


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.bfloat16])
def test_cache_of_another_dtype_and_layout(device: str, backend: str, cache_dtype: torch.dtype) -> None:
    q, k, v, positions, k_cache, v_cache, cache_positions = cache_inputs(device)
    q, k, v = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v))
    buffers = [cache.to(cache_dtype).transpose(1, 2).contiguous().transpose(1, 2) for cache in (k_cache, v_cache)]
    rotated_q, rotated_k = apply_rotary(q, k, positions)
    expected = [written(cache, new, cache_positions) for cache, new in zip(buffers, (rotated_k, v), strict=True)]
    torch.testing.assert_close(apply_rotary_to_cache(q, k, v, positions, *buffers, cache_positions.int()), rotated_q)
    for actual, wanted in zip(buffers, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **one_rounding(backend, device, cache_dtype))


def test_cache_positions_shared_by_the_batch(device: str, backend: str) -> None:
    q, k, v, positions, k_cache, v_cache, cache_positions = cache_inputs(device)
    copies = k_cache.clone(), v_cache.clone()
    apply_rotary_to_cache(q, k, v, positions[0], k_cache, v_cache, cache_positions[0])
    apply_rotary_to_cache(q, k, v, positions[:1].expand(2, -1), *copies, cache_positions[:1].expand(2, -1))
    torch.testing.assert_close((k_cache, v_cache), copies, rtol=0, atol=0)


def test_cache_compiles(device: str, backend: str) -> None:
    inputs = cache_inputs(device)
    expected = [tensor.clone() for tensor in inputs]
    out = apply_rotary_to_cache(*expected)
    compiled = torch.compile(apply_rotary_to_cache, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close((compiled(*inputs), inputs), (out, expected), rtol=0, atol=0)


@pytest.mark.parametrize("batch", [2, 0])
def test_cache_opcheck(device: str, backend: str, batch: int) -> None:
    q, k, v, positions, k_cache, v_cache, cache_positions = cache_inputs(device)
    inputs = [tensor[:batch] for tensor in (q, k, v, positions, k_cache, v_cache, cache_positions)]
    inputs.insert(4, 10_000.0)
    name = "apply_rotary_to_cache" + ("" if backend == "reference" else f"_{backend}")
    torch.library.opcheck(getattr(torch.ops.pg_kernels, name).default, inputs)


@pytest.mark.parametrize("outside", [-1, 9])
def test_cache_positions_outside_the_cache(device: str, backend: str, outside: int) -> None:
    q, k, v, positions, k_cache, v_cache, cache_positions = cache_inputs(device)
    cache_positions[1, 2] = outside
    before = k_cache.clone(), v_cache.clone()
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"cache_positions: {outside} is outside the cache's \[0, 9\)"):
            apply_rotary_to_cache(q, k, v, positions, k_cache, v_cache, cache_positions)
        torch.testing.assert_close((k_cache, v_cache), before, rtol=0, atol=0)
    if backend == "triton":  # as on a GPU, where the values are not checked
        out = torch.ops.pg_kernels.apply_rotary_to_cache_triton(
            q, k, v, positions, 1e4, k_cache, v_cache, cache_positions
        )
        assert out[1, :, 2].isnan().all() and out.isnan().sum() == out[1, :, 2].numel()
        keep = cache_positions[1] != outside
        kept = [
            written(cache[1:], new[1:, :, keep], cache_positions[1:, keep])
            for cache, new in zip(before, (k, v), strict=True)
        ]
        torch.testing.assert_close(v_cache[1:], kept[1], rtol=0, atol=0)
        assert k_cache.isfinite().all()


@needs_extension
@pytest.mark.parametrize("layout", [lambda t: t, shifted, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)])
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [{"dim": 2}, {"dim": 72, "kv_heads": 3}, {"dim": 256, "heads": 8, "kv_heads": 1}], ids=str
)
def test_native_cache(
    sizes: dict[str, int], dtype: torch.dtype, cache_dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    """The C++ kernel's error from the reference in float64 is bounded by the error of the reference in the same dtype."""
    inputs = cache_inputs("cpu", dtype, **{"heads": 3, **sizes})
    inputs[4:6] = [cache.to(cache_dtype) for cache in inputs[4:6]]
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    plain, ours = [t.clone() for t in inputs], [layout(t.clone()) if t.dim() == 4 else t for t in inputs]
    results = []
    for backend, tensors in (("native", ours), ("reference", plain), ("reference", exact)):
        with use_backend(backend):
            results.append([apply_rotary_to_cache(*tensors), *tensors[4:6]])
    for our, low, reference in zip(*results, strict=True):
        assert_within(our, low, reference)


@needs_extension
def test_the_cpp_kernel_refuses_long_heads() -> None:
    inputs = cache_inputs("cpu", dim=258)
    with use_backend("native"), pytest.raises(RuntimeError, match="heads longer than 256"):
        apply_rotary_to_cache(*inputs)
    apply_rotary_to_cache(*inputs)


@needs_extension
def test_a_compiled_graph_does_not_write_outside_the_cache() -> None:
    q, k, v, positions, k_cache, v_cache, cache_positions = cache_inputs("cpu")
    compiled = torch.compile(apply_rotary_to_cache, fullgraph=True, backend="aot_eager")
    cache_positions[1, 2] = 10**8
    with pytest.raises(ValueError, match="cache_positions: 100000000 is outside the cache's"):
        compiled(q, k, v, positions, k_cache, v_cache, cache_positions)


@needs_extension
def test_queries_with_overlapping_strides() -> None:
    """unfold gives such tensors: two dimensions have the same stride."""
    _, k, v, positions, k_cache, v_cache, cache_positions = cache_inputs("cpu")
    q = randn(300).as_strided((2, 4, k.shape[2], k.shape[3]), (24, 4, 1, 1))
    expected = apply_rotary_to_cache(q.contiguous(), k, v, positions, k_cache, v_cache, cache_positions)
    assert torch.equal(apply_rotary_to_cache(q, k, v, positions, k_cache, v_cache, cache_positions), expected)


def test_cache_takes_no_gradients() -> None:
    inputs = cache_inputs("cpu")
    inputs[1].requires_grad_()
    with pytest.raises(RuntimeError, match="gradients do not flow through a cache"):
        apply_rotary_to_cache(*inputs)
    with torch.no_grad():
        assert not apply_rotary_to_cache(*inputs).requires_grad


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (2, lambda v: v[:, :1], ValueError, "v: expected shape"),
        (4, lambda cache: cache[..., :8], ValueError, "k_cache: expected shape"),
        (5, lambda cache: cache[:, :, :4], ValueError, "v_cache: expected shape"),
        (5, lambda cache: cache.half(), TypeError, "v_cache: has dtype"),
        (4, lambda cache: cache.int(), TypeError, "k_cache: expected float32"),
        (6, lambda cache_positions: cache_positions.float(), TypeError, "cache_positions: expected int32 or int64"),
        (6, lambda cache_positions: cache_positions[:, :2], ValueError, "cache_positions: expected shape"),
        (6, lambda cache_positions: cache_positions[0, :2], ValueError, "cache_positions: expected shape"),
    ],
)
def test_cache_errors(index: int, change: Callable[[Tensor], Tensor], error: type[Exception], message: str) -> None:
    inputs = cache_inputs("cpu")
    inputs[index] = change(inputs[index])
    with pytest.raises(error, match=message):
        apply_rotary_to_cache(*inputs)
