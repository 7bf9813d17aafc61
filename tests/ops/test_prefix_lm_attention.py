from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from helpers import (
    DEVICES,
    DTYPES,
    assert_accurate,
    assert_any_layout,
    assert_autocasts,
    assert_compiles,
    assert_frozen_inputs,
    assert_pure,
    assert_same,
    assert_within,
    every_other,
    leaves,
    needs_extension,
    randn,
    run,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pg_kernels import backend as use_backend
from pg_kernels import prefix_lm_attention, prefix_lm_attention_varlen
from pg_kernels.ops._common import devices
from pg_kernels.ops.prefix_lm_attention import cpu, launch, tile_ranges, tiles

OP = "prefix_lm_attention"


def visible_pairs(
    batch: int,
    q_len: int,
    kv_len: int,
    *,
    prefix_lens: list[int] | None = None,
    kv_starts: list[int] | None = None,
    kv_lens: list[int] | None = None,
    q_starts: list[int] | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """Return the mask [B, Sq, Skv], pair by pair from the mask contract: true where query i of example b sees key j."""
    prefix_lens = prefix_lens or [0] * batch
    kv_starts = kv_starts or [0] * batch
    kv_lens = kv_lens or [kv_len] * batch
    q_starts = q_starts or [kv_len - q_len] * batch

    def sees(b: int, i: int, j: int) -> bool:
        p = q_starts[b] + i
        valid = kv_starts[b] <= j < kv_lens[b]
        in_prefix = j - kv_starts[b] < prefix_lens[b]
        allowed = (not causal or j <= p) and (window is None or p - j < window)
        return valid and (in_prefix or allowed)

    pairs = [sees(b, i, j) for b in range(batch) for i in range(q_len) for j in range(kv_len)]
    return torch.tensor(pairs, dtype=torch.bool).view(batch, q_len, kv_len)


def definition(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """Compute softmax over the visible keys, one head of one example at a time."""
    batch, heads, _, dim = q.shape
    heads_per_kv = heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    rows = []
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // heads_per_kv], v[b, h // heads_per_kv]
            scores = q[b, h] @ keys.T * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            seeing_rows = visible[b].any(-1).nonzero()[:, 0].to(q.device)
            weights = scores[seeing_rows].masked_fill(~visible[b].to(q.device)[seeing_rows], float("-inf")).softmax(-1)
            rows.append(torch.zeros_like(q[b, h]).index_copy(0, seeing_rows, weights @ values))
    return torch.stack(rows).unflatten(0, (batch, heads)) if rows else q * 0 + k.sum() + v.sum()


def tensors(
    device: str,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    q_len: int = 6,
    kv_len: int | None = None,
    dim: int = 16,
) -> list[Tensor]:
    """Draw q, k and v."""
    kv_len = q_len if kv_len is None else kv_len
    return [
        randn(batch, heads, q_len, dim, device=device),
        randn(batch, kv_heads, kv_len, dim, device=device),
        randn(batch, kv_heads, kv_len, dim, device=device),
    ]


def on(device: str, options: dict[str, Any]) -> dict[str, Any]:
    """Turn lists into int32 tensors on `device`."""
    return {
        name: torch.tensor(value, dtype=torch.int32, device=device) if isinstance(value, list) else value
        for name, value in options.items()
    }


ORDER = 4.0
"""Size of the terms of a score's gradient: the difference of two sums of 16 products or more.

The sums are equal if a query sees a single key.
"""


def check(inputs: list[Tensor], options: dict[str, Any], dtype: torch.dtype, **scores: float) -> None:
    """Check output and gradients. `options` are the mask, with lists for lengths; `scores` are scale and softcap."""
    q, k, _ = inputs
    visible = visible_pairs(q.shape[0], q.shape[2], k.shape[2], **options)
    arguments = on(q.device.type, options)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefix_lm_attention(q, k, v, **arguments, **scores)

    def define(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return definition(q, k, v, visible, **scores)

    assert_accurate(attend, define, inputs, dtype, order=ORDER)
    if q.shape[2] > cpu.MAX_FEW_QUERIES:
        return
    # Without gradients the C++ extension computes a few queries.
    low = [tensor.to(dtype) for tensor in inputs]
    assert_within(attend(*low), define(*low), define(*(tensor.double() for tensor in low)), "without gradients", ORDER)


MASKS = {
    "causal": {},
    "not_causal": {"causal": False},
    "prefix_0": {"prefix_lens": [0, 0]},
    "prefix_1": {"prefix_lens": [1, 1]},
    "prefix_full": {"prefix_lens": [6, 6]},
    "prefix_all_but_one": {"prefix_lens": [5, 5]},
    "prefix_beyond_the_end": {"prefix_lens": [9, 1000]},
    "prefixes_differ": {"prefix_lens": [2, 4]},
    "left_padding": {"kv_starts": [2, 0], "prefix_lens": [3, 4]},
    "right_padding": {"kv_lens": [4, 6], "prefix_lens": [3, 4]},
    "both_paddings": {"kv_starts": [1, 2], "kv_lens": [5, 4], "prefix_lens": [2, 1]},
    "padding_without_prefix": {"kv_starts": [1, 2], "kv_lens": [5, 4]},
    "prefix_beyond_right_padding": {"kv_lens": [3, 2], "prefix_lens": [5, 4]},
    "nothing_valid": {"kv_starts": [4, 0], "kv_lens": [4, 0], "prefix_lens": [6, 6]},
    "start_after_end": {"kv_starts": [5, 0], "kv_lens": [2, 6], "prefix_lens": [6, 1]},
    "window": {"window": 2},
    "window_of_one": {"window": 1},
    "window_and_prefix": {"window": 2, "prefix_lens": [2, 3]},
    "window_not_causal": {"window": 2, "causal": False},
    "window_wide": {"window": 100},
    "queries_first": {"q_starts": [0, 0]},
    "queries_before_all_keys": {"q_starts": [-3, -100]},
    "queries_after_all_keys": {"q_starts": [6, 100]},
    "queries_after_all_windows": {"q_starts": [6, 100], "window": 3},
}


@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients(device: str, backend: str, dtype: torch.dtype, mask: str) -> None:
    check(tensors(device), MASKS[mask], dtype)


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 8, "kv_heads": 1},
        {"heads": 3, "kv_heads": 3},
        {"heads": 1, "kv_heads": 1, "batch": 1, "q_len": 1},
        {"dim": 17, "q_len": 5},
        {"dim": 64, "q_len": 17},
        {"dim": 72, "q_len": 9},
        {"dim": 100, "q_len": 3, "kv_len": 5},
        {"dim": 128, "q_len": 7},
        {"dim": 256, "q_len": 5, "kv_len": 9},
        {"q_len": 3, "kv_len": 40},
        {"q_len": 40, "kv_len": 3},
        {"q_len": 1, "kv_len": 33},
        {"batch": 0},
        {"q_len": 0, "kv_len": 4},
        {"q_len": 4, "kv_len": 0},
    ],
    ids=str,
)
def test_sizes(device: str, backend: str, dtype: torch.dtype, sizes: dict[str, int]) -> None:
    check(tensors(device, **sizes), {}, dtype)


@pytest.mark.parametrize("prefix", [63, 64, 65, 127, 128, 129, 130])
def test_around_tile_boundaries(device: str, backend: str, prefix: int) -> None:
    inputs = tensors(device, batch=2, heads=2, kv_heads=1, q_len=130)
    check(inputs, {"prefix_lens": [prefix, prefix - 1], "kv_starts": [0, 1], "kv_lens": [130, 129]}, torch.float32)


@pytest.mark.parametrize("window", [63, 64, 65])
def test_windows_around_tile_boundaries(device: str, backend: str, window: int) -> None:
    inputs = tensors(device, batch=1, heads=1, kv_heads=1, q_len=130)
    check(inputs, {"prefix_lens": [5], "window": window}, torch.float32)


@pytest.mark.parametrize("softcap", [0.5, 50.0])
@pytest.mark.parametrize("scale", [None, 0.1, 1.0])
def test_scale_and_softcap(device: str, backend: str, dtype: torch.dtype, scale: float | None, softcap: float) -> None:
    scores = {"softcap": softcap} if scale is None else {"softcap": softcap, "scale": scale}
    check(tensors(device), {"prefix_lens": [2, 4], "kv_starts": [1, 0]}, dtype, **scores)


def test_scores_beyond_fp16(device: str, backend: str) -> None:
    q, k, v = tensors(device, q_len=3, dim=64)
    q, k = ((tensor * 200).half() for tensor in (q, k))
    out = prefix_lm_attention(q, k, v.half(), scale=1.0)
    expected = definition(q.double(), k.double(), v.half().double(), visible_pairs(2, 3, 3), scale=1.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)


@st.composite
def masks(draw: st.DrawFn) -> tuple[int, int, int, dict[str, Any]]:
    """Draw (batch, Sq, Skv) and a mask. Every length takes values up to its bounds; prefix_lens and q_starts also beyond."""
    batch, q_len, kv_len = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, kv_len + 1))
    for name, low, high in [
        ("prefix_lens", 0, kv_len + 2),
        ("kv_starts", 0, kv_len),
        ("kv_lens", 0, kv_len),
        ("q_starts", -3, kv_len + 3),
    ]:
        if draw(st.booleans()):
            options[name] = [draw(st.integers(low, high)) for _ in range(batch)]
    return batch, q_len, kv_len, options


@given(mask=masks())
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
def test_any_mask(device: str, backend: str, mask: tuple[int, int, int, dict[str, Any]]) -> None:
    """All scores are equal and each key has its own column of v: an output column is not 0 exactly where its key is visible.

    Padding keys hold NaN, which must not reach the output.
    """
    batch, q_len, kv_len, options = mask
    visible = visible_pairs(batch, q_len, kv_len, **options).to(device)
    q, k = randn(batch, 1, q_len, 64, device=device), torch.zeros(batch, 1, kv_len, 64, device=device)
    v = torch.eye(64, device=device)[:kv_len].repeat(batch, 1, 1, 1)
    for b in range(batch):
        start, end = options.get("kv_starts", [0] * batch)[b], options.get("kv_lens", [kv_len] * batch)[b]
        for tensor in (k, v):
            tensor[b, :, :start] = tensor[b, :, max(end, start) :] = float("nan")
    out = prefix_lm_attention(q, k, v, **on(device, options))[:, 0, :, :kv_len]
    expected = visible / visible.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(out, expected)


def test_rows_that_see_nothing_are_zero_with_zero_gradients(device: str, backend: str, dtype: torch.dtype) -> None:
    q, k, v = (tensor.to(dtype).requires_grad_() for tensor in tensors(device))
    kv_lens = torch.tensor([0, 6], device=device, dtype=torch.int32)
    out = prefix_lm_attention(q, k, v, kv_starts=2, kv_lens=kv_lens)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    for tensor in (out, *gradients):
        assert not tensor[0].any(), "example 0 has no valid key"
    assert not out[1, :, :2].any() and not gradients[0][1, :, :2].any(), "keys 0 and 1 are padding"
    assert out[1, :, 2:].any()
    assert not gradients[1][1, :, :2].any() and not gradients[2][1, :, :2].any()


@pytest.mark.parametrize("garbage", [float("inf"), float("nan")])
@pytest.mark.parametrize("q_len", [1, 20])
def test_queries_that_see_nothing_may_hold_garbage(device: str, backend: str, q_len: int, garbage: float) -> None:
    """ExampleLengths 0 has no valid key. In example 1 the first of 20 queries stands before the first valid key."""
    q, k, v = tensors(device, q_len=q_len, kv_len=20)
    position = torch.arange(20 - q_len, 20, device=device)
    sees_nothing = torch.stack((position >= 0, position < 1))[:, None, :, None].expand_as(q)
    q = q.masked_fill(sees_nothing, garbage).requires_grad_()
    kv_lens = torch.tensor([1, 20], device=device, dtype=torch.int32)
    with torch.no_grad():
        out_without_grad = prefix_lm_attention(q, k, v, kv_starts=1, kv_lens=kv_lens)
    out = prefix_lm_attention(q, k, v, kv_starts=1, kv_lens=kv_lens)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    for tensor in (out_without_grad, out, gradient):
        assert not tensor[sees_nothing].any() and tensor.isfinite().all()


def test_padding_keys_may_hold_garbage(device: str, backend: str) -> None:
    """The unused end of a static cache is uninitialised memory."""
    q, k, v = tensors(device, q_len=2, kv_len=6)
    starts, ends = (torch.tensor(value, device=device, dtype=torch.int32) for value in ([1, 0], [5, 3]))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefix_lm_attention(q, k, v, prefix_lens=2, kv_starts=starts, kv_lens=ends, q_starts=ends - 2)

    expected = run(attend, [q, k, v])
    for garbage in (float("nan"), float("inf"), -float("inf")):
        for tensor in (k, v):
            tensor[0, :, 0] = tensor[0, :, 5:] = tensor[1, :, 3:] = garbage
        assert_same(run(attend, [q, k, v]), expected)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_static_cache_decodes_like_prefill(device: str, backend: str, dtype: torch.dtype, kv_heads: int) -> None:
    """Decode one query at a time from a cache with unused space, left padding and a prefix."""
    q, k, v = (tensor.to(dtype) for tensor in tensors(device, kv_heads=kv_heads, q_len=8))
    masks = {
        name: torch.tensor(value, device=device) for name, value in {"prefix_lens": [3, 4], "kv_starts": [2, 0]}.items()
    }
    prefill = prefix_lm_attention(q, k, v, **masks)
    cache = [torch.nn.functional.pad(tensor, (0, 0, 0, 5), value=3.0) for tensor in (k, v)]
    for position in range(6, 8):
        length = torch.full((2,), position + 1, device=device, dtype=torch.int32)
        one = prefix_lm_attention(
            q[:, :, position : position + 1], *cache, **masks, kv_lens=length, q_starts=length - 1
        )
        torch.testing.assert_close(one, prefill[:, :, position : position + 1])


def test_static_cache_of_different_lengths(device: str, backend: str, dtype: torch.dtype) -> None:
    check(
        tensors(device, q_len=1, kv_len=12),
        {"prefix_lens": [4, 5], "kv_starts": [0, 2], "kv_lens": [6, 11], "q_starts": [5, 10]},
        dtype,
    )


def test_matches_torch(device: str, backend: str) -> None:
    q, k, v = tensors(device, q_len=33, kv_heads=4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert_same(run(prefix_lm_attention, [q, k, v]), run(lambda q, k, v: attention(q, k, v, is_causal=True), [q, k, v]))
    assert_same(run(lambda q, k, v: prefix_lm_attention(q, k, v, causal=False), [q, k, v]), run(attention, [q, k, v]))


def test_ints_and_tensors_agree(device: str, backend: str) -> None:
    inputs = tensors(device, q_len=4, kv_len=9)
    ints = {"prefix_lens": 3, "kv_starts": 1, "kv_lens": 8, "q_starts": 4}
    expected = run(lambda q, k, v: prefix_lm_attention(q, k, v, **ints), inputs)
    for dtype in (torch.int32, torch.int64):
        lengths = {name: torch.tensor([number, number], dtype=dtype, device=device) for name, number in ints.items()}
        assert_same(run(lambda q, k, v, lengths=lengths: prefix_lm_attention(q, k, v, **lengths), inputs), expected)
    strided = {name: every_other(tensor) for name, tensor in lengths.items()}
    assert_same(run(lambda q, k, v: prefix_lm_attention(q, k, v, **strided), inputs), expected)


@pytest.mark.parametrize("far", [2**31, 2**40])
def test_int64_lengths_do_not_wrap(device: str, backend: str, far: int) -> None:
    q, k, v = tensors(device)
    everything = prefix_lm_attention(q, k, v, causal=False)
    for value in (far, torch.tensor([far, far], device=device)):
        torch.testing.assert_close(prefix_lm_attention(q, k, v, prefix_lens=value), everything)
        assert not prefix_lm_attention(q, k, v, q_starts=value, window=2).any()


def test_lengths_are_not_written(device: str, backend: str) -> None:
    q, k, v = tensors(device)
    lengths = on(device, {"prefix_lens": [1, 2], "kv_starts": [0, 1], "kv_lens": [5, 6], "q_starts": [0, 1]})
    before = {name: tensor.clone() for name, tensor in lengths.items()}
    prefix_lm_attention(q.requires_grad_(), k, v, **lengths).sum().backward()
    for name, tensor in lengths.items():
        assert torch.equal(tensor, before[name]) and tensor._version == 0


def test_any_layout(device: str, backend: str) -> None:
    options = on(device, {"prefix_lens": [2, 3], "kv_starts": [1, 0]})
    assert_any_layout(lambda q, k, v: prefix_lm_attention(q, k, v, **options), tensors(device))


def test_heads_split_from_a_projection(device: str, backend: str) -> None:
    """q, k and v are views of one projection's output [B, S, (H + 2·Hkv)·D]."""
    rows = randn(2, 6, 8 * 16, device=device)

    def split(x: Tensor) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (8, 16)).transpose(1, 2).split((4, 2, 2), dim=1)

    assert_same(
        run(lambda x: prefix_lm_attention(*split(x), prefix_lens=2), [rows]),
        run(lambda x: prefix_lm_attention(*(part.contiguous() for part in split(x)), prefix_lens=2), [rows]),
    )


def test_one_tensor_in_three_places(device: str, backend: str) -> None:
    x = randn(2, 3, 5, 16, device=device)
    assert_same(
        run(lambda x: prefix_lm_attention(x, x, x), [x]),
        run(lambda x: prefix_lm_attention(x, x.clone(), x.clone()), [x]),
    )


def test_pure(device: str, backend: str) -> None:
    assert_pure(lambda q, k, v: prefix_lm_attention(q, k, v, prefix_lens=2, softcap=5.0), tensors(device))


def test_frozen_inputs(device: str, backend: str) -> None:
    assert_frozen_inputs(lambda q, k, v: prefix_lm_attention(q, k, v, prefix_lens=2), tensors(device))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_casts_all_three(device: str, backend: str, low: torch.dtype) -> None:
    inputs = tensors(device)
    assert_autocasts(prefix_lm_attention, inputs, low)
    with torch.autocast(device, low):
        mixed = prefix_lm_attention(inputs[0], inputs[1].to(low), inputs[2])
    torch.testing.assert_close(mixed, prefix_lm_attention(*(tensor.to(low) for tensor in inputs)), rtol=0, atol=0)


IN_GRAPHS = pytest.mark.backends("triton", "reference")
"""The native backend reads the values of lengths, which a compiled graph does not know."""


@IN_GRAPHS
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles(device: str, backend: str, compiler: str) -> None:
    options = on(device, {"prefix_lens": [2, 3], "kv_starts": [1, 0], "kv_lens": [6, 5], "q_starts": [0, 0]})
    assert_compiles(
        lambda q, k, v: prefix_lm_attention(q, k, v, **options, softcap=20.0, window=3), tensors(device), compiler
    )


@IN_GRAPHS
def test_compiles_with_ints(device: str, backend: str) -> None:
    assert_compiles(lambda q, k, v: prefix_lm_attention(q, k, v, prefix_lens=2, kv_lens=5), tensors(device))


@IN_GRAPHS
def test_compiles_for_any_length(device: str, backend: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefix_lm_attention(q, k, v, prefix_lens=k.shape[2] - 2)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for q_len, kv_len in ((5, 7), (3, 17)):
        inputs = tensors(device, q_len=q_len, kv_len=kv_len)
        assert_same(run(compiled, inputs), run(attend, inputs))


BAD_LENGTHS = [
    ("kv_lens", [7, 6], r"^kv_lens: got values from 6 to 7, expected between 0 and Skv = 6"),
    ("kv_lens", [-1, 6], r"^kv_lens: got values from -1 to 6, expected between 0 and Skv = 6"),
    ("kv_starts", [7, 0], r"^kv_starts: got values from 0 to 7, expected between 0 and Skv = 6"),
    ("kv_starts", [-1, 0], r"^kv_starts: got values from -1 to 0, expected between 0 and Skv = 6"),
    ("prefix_lens", [-2, 3], r"^prefix_lens: got values from -2 to 3, expected at least 0"),
]


@pytest.mark.parametrize(("name", "lengths", "message"), BAD_LENGTHS)
def test_bad_lengths_raise_where_they_can_be_read(name: str, lengths: list[int], message: str) -> None:
    q, k, v = tensors("cpu")
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(ValueError, match=message):
            prefix_lm_attention(q, k, v, **{name: torch.tensor(lengths, dtype=dtype)})
    bad = lengths[0]
    with pytest.raises(ValueError, match=rf"^{name}: got {bad}, expected"):
        prefix_lm_attention(q, k, v, **{name: bad})


@IN_GRAPHS
@pytest.mark.parametrize(("name", "lengths"), [(name, lengths) for name, lengths, _ in BAD_LENGTHS])
def test_bad_lengths_give_nan_where_they_cannot(device: str, backend: str, name: str, lengths: list[int]) -> None:
    """Only the example with invalid lengths is NaN."""
    q, k, v = tensors(device)
    attend = prefix_lm_attention
    if device == "cpu":
        attend = torch.compile(prefix_lm_attention, fullgraph=True, backend="aot_eager")
    out = attend(q, k, v, **on(device, {name: lengths}))
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1:], prefix_lm_attention(q[1:], k[1:], v[1:], **on(device, {name: lengths[1:]})))


@IN_GRAPHS
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, (True, 0.25, None, None)),
        ({"batch": 0}, (True, 0.25, None, None)),
        ({"q_len": 1, "kv_len": 5, "dim": 64}, (False, 1.0, 10.0, 3)),
    ],
    ids=str,
)
def test_opcheck(device: str, backend: str, sizes: dict[str, int], options: tuple[Any, ...]) -> None:
    inputs = tensors(device, **sizes)
    q, k, _ = inputs
    batch, kv_len = q.shape[0], k.shape[2]
    lengths = [torch.full((batch,), n, dtype=torch.int32, device=device) for n in (2, 1, kv_len, kv_len - q.shape[2])]
    ops = torch.ops.pg_kernels
    if backend == "reference":
        torch.library.opcheck(ops.prefix_lm_attention.default, (*leaves(*inputs), *lengths, *options))
        return
    numbers = [None, lengths[1], None, None, None, [2, 0, kv_len, kv_len - q.shape[2], 0]]
    for sides, needs_kv in (([*lengths, None, [0] * 5], True), (numbers, False)):
        torch.library.opcheck(ops.prefix_lm_attention_triton.default, (*leaves(*inputs), None, None, *sides, *options))
        out, lse = ops.prefix_lm_attention_triton(*inputs, None, None, *sides, *options)
        arguments = (torch.ones_like(out), *inputs, out, lse, *sides, *options, needs_kv)
        torch.library.opcheck(ops.prefix_lm_attention_triton_backward.default, arguments)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_of_the_reference(softcap: float | None) -> None:
    inputs = [tensor.double().requires_grad_() for tensor in tensors("cpu", q_len=3, kv_len=4, dim=2)]
    lengths = {"prefix_lens": torch.tensor([2, 0]), "kv_lens": torch.tensor([4, 2]), "kv_starts": torch.tensor([0, 2])}
    with use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda q, k, v: prefix_lm_attention(q, k, v, **lengths, softcap=softcap), inputs
        )


Q, K = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q.int()}, TypeError, r"^q: expected float32, float16 or bfloat16, got torch.int32"),
        ({"q": None}, TypeError, r"^q: expected a tensor, got NoneType"),
        ({"v": None}, TypeError, r"^v: expected a tensor, got NoneType"),
        ({"v": K.half()}, TypeError, r"^v: has dtype torch.float16, but q has torch.float32"),
        ({"prefix_lens": torch.ones(2)}, TypeError, r"^prefix_lens: expected int32 or int64, got torch.float32"),
        ({"kv_lens": [3, 4]}, TypeError, r"^kv_lens: expected an int or an int32 tensor, got list"),
        ({"kv_lens": 2.0}, TypeError, r"^kv_lens: expected an int or an int32 tensor, got float"),
        ({"q_starts": True}, TypeError, r"^q_starts: expected an int or an int32 tensor, got bool"),
        ({"q": Q[0]}, ValueError, r"^q: expected shape \[B, H, Sq, D\], got \[4, 3, 8\]"),
        ({"k": K[:1], "v": K[:1]}, ValueError, r"^k: expected shape \[2, Hkv, Skv, 8\] .*, got \[1, 2, 5, 8\]"),
        (
            {"k": K[..., :4], "v": K[..., :4]},
            ValueError,
            r"^k: expected shape \[2, Hkv, Skv, 8\] .*, got \[2, 2, 5, 4\]",
        ),
        ({"v": K[:, :, :4]}, ValueError, r"^v: expected shape \[2, 2, 5, 8\] .*, got \[2, 2, 4, 8\]"),
        ({"q": Q[:, :3]}, ValueError, r"^k: q's 3 heads are not a multiple of 2 key-value heads"),
        ({"k": K[:, :0], "v": K[:, :0]}, ValueError, r"^k: q's 4 heads are not a multiple of 0 key-value heads"),
        ({"q": Q[..., :0], "k": K[..., :0], "v": K[..., :0]}, ValueError, r"^q: the head dimension is 0"),
        ({"k": K.to("meta")}, ValueError, r"^k: is on meta, but q is on cpu"),
        ({"prefix_lens": torch.ones(3).int()}, ValueError, r"^prefix_lens: expected shape \[2\] .*, got \[3\]"),
        ({"q_starts": torch.tensor(1)}, ValueError, r"^q_starts: expected shape \[2\] .*, got \[\]"),
        ({"kv_starts": torch.ones(2).int().to("meta")}, ValueError, r"^kv_starts: is on meta, but q is on cpu"),
        ({"scale": 0.0}, ValueError, r"^scale: expected a positive number, got 0.0"),
        ({"softcap": -1.0}, ValueError, r"^softcap: expected a positive number, got -1.0"),
        ({"window": 0}, ValueError, r"^window: expected a positive number, got 0"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prefix_lm_attention(**{"q": Q, "k": K, "v": K, **change})


# --- tiles


def small(
    block_m: int, block_n: int, dim: int = 16, itemsize: int = 4, use_tma: bool = False
) -> AbstractContextManager[None]:
    """Run with tiles so small that short sequences have many."""
    names = [
        ("prefix_lm_attention", tiles.key(kernel, dim, itemsize, num_rows))
        for kernel in ("forward", "backward_dq", "backward_dkv")
        for num_rows in (64, 65)
    ]
    return devices.override_tiles(dict.fromkeys(names, asdict(tiles.Tiles(block_m, block_n, 4, 1, use_tma))))


@pytest.fixture(params=[(16, 16), (32, 16), (16, 32)], ids=str)
def small_tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    with small(*request.param):
        yield


MANY_TILES: dict[str, dict[str, Any]] = {
    "causal": {},
    "not_causal": {"causal": False},
    "prefix_on_a_boundary": {"prefix_lens": [32, 16]},
    "prefix_and_paddings": {"prefix_lens": [33, 15], "kv_starts": [7, 16], "kv_lens": [69, 61]},
    "window": {"window": 20},
    "window_of_one_tile": {"window": 16, "prefix_lens": [16, 0]},
    "window_far_behind_the_prefix": {"window": 40, "prefix_lens": [5, 17]},
    "window_not_causal": {"window": 10, "prefix_lens": [20, 0], "causal": False},
    "window_shorter_than_the_prefix": {"window": 3, "prefix_lens": [50, 31], "kv_starts": [0, 9]},
    "queries_in_the_middle": {"q_starts": [-5, 30], "window": 9, "prefix_lens": [0, 12]},
}


@pytest.mark.backends("triton")
@pytest.mark.parametrize("mask", MANY_TILES)
def test_many_tiles(device: str, backend: str, small_tiles: None, mask: str) -> None:
    inputs = tensors(device, heads=3, kv_heads=1, q_len=70)
    check(inputs, MANY_TILES[mask], torch.float32)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("prefix", [0, 40, 150])
def test_decoding_shares_the_keys_among_programs(device: str, backend: str, prefix: int, dtype: torch.dtype) -> None:
    """Cover splits and rows without visible keys, and a window that does not touch the prefix."""
    for length, options in (([150, 40], {}), ([150, 0], {}), ([149, 120], {"window": 30})):
        options = {"kv_lens": length, "prefix_lens": [prefix, min(prefix, 20)], "kv_starts": [0, 11], **options}
        options["q_starts"] = [n - 2 for n in length]
        options["kv_starts"][1] = min(options["kv_starts"][1], length[1])
        check(tensors(device, heads=8, kv_heads=1, q_len=2, kv_len=160, dim=32), options, dtype)
    q, k, v = tensors(device, heads=8, kv_heads=1, q_len=2, kv_len=160, dim=32)
    chosen = tiles.choose("forward", 32, 4, 16, devices.device_of(q))
    assert tiles.num_splits(2, 160, chosen.block_n, devices.device_of(q)) > 1


@pytest.mark.backends("triton")
@pytest.mark.parametrize("mask", MANY_TILES)
@pytest.mark.parametrize("dim", [16, 72])
def test_tma_loads_what_pointers_load(
    device: str, backend: str, dim: int, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = DTYPES[list(MANY_TILES).index(mask) % 3]  # one dtype for each mask: all of them take three times as long
    q, k, v = (t.to(dtype) for t in tensors(device, heads=3, kv_heads=1, q_len=70, dim=dim))
    options = on(device, MANY_TILES[mask])
    for tensor in (k, v):  # padding keys may hold garbage
        for b, start in enumerate(options.get("kv_starts", [])):
            tensor[b, :, :start] = float("nan")
        for b, end in enumerate(options.get("kv_lens", [])):
            tensor[b, :, end:] = float("nan")
    loads = spy(monkeypatch, "_tma_descriptors")
    outs = []
    for use_tma in (False, True):
        with small(32, 16, dim, dtype.itemsize, use_tma):
            outs.append(prefix_lm_attention(q, k, v, **options))
        assert [part is not None for part in loads.pop().values()] == [use_tma, use_tma and dim == 72] * 2
    assert_same(*outs)
    assert not outs[0].isnan().any()


@pytest.mark.backends("triton")
def test_tma_with_packed_sequences(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = packed(device, 9)
    loads = spy(monkeypatch, "_tma_descriptors")
    with small(16, 16, use_tma=True):
        with_tma = pack_of_two(*inputs)
    assert loads.pop()["k_desc"] is not None
    assert_same(with_tma, pack_of_two(*inputs))


@pytest.mark.backends("triton")
def test_pointers_where_the_layout_rules_tma_out(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(device, kv_heads=2)
    expanded, unaligned = v[:, :1].expand_as(v), torch.cat([k.flatten()[:1], k.flatten()])[1:].view_as(k)
    assert unaligned.data_ptr() % 16
    loads = spy(monkeypatch, "_tma_descriptors")
    for inputs in ((q, k, expanded), (q, unaligned, v)):
        with small(16, 16, use_tma=True):
            out = prefix_lm_attention(*inputs)
        assert set(loads.pop().values()) == {None}
        assert_same(out, prefix_lm_attention(*inputs))


def spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Return a list to which every call of a function of `launch` appends its result."""
    function, returned = getattr(launch, name), []

    def spied(*args: Any) -> Any:
        returned.append(function(*args))
        return returned[-1]

    monkeypatch.setattr(launch, name, spied)
    return returned


@triton.jit
def _count(
    out_ptr, start, end, prefix_end, q_start, window, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    first = q_start + tl.program_id(0) * BLOCK_M
    _, num_full, _, num_boundary = tile_ranges.key_tiles(
        first, first + BLOCK_M - 1, start, end, prefix_end, window, CAUSAL, BLOCK_N
    )
    tl.store(out_ptr + 2 * tl.program_id(0), num_full)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, num_boundary)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 25, 48])
@pytest.mark.parametrize(("prefix", "causal"), [(320, True), (160, True), (150, True), (0, True), (0, False)])
def test_no_tile_too_many(device: str, prefix: int, causal: bool, window: int | None) -> None:
    """The full tiles and the boundary tiles together are the tiles that some query sees; full ones are seen by all queries."""
    block_m, block_n, length = 64, 32, 320
    counts = torch.zeros(length // block_m, 2, dtype=torch.int32, device=device)
    _count[(length // block_m,)](counts, 0, length, prefix, 0, window, causal, block_m, block_n)
    visible = visible_pairs(1, length, length, prefix_lens=[prefix], causal=causal, window=window)[0]
    blocks = visible.view(length // block_m, block_m, length // block_n, block_n).transpose(1, 2)
    seen, full = blocks.any(-1).any(-1).sum(-1), blocks.all(-1).all(-1).sum(-1)
    assert counts.sum(-1).tolist() == seen.tolist()
    assert counts[:, 0].tolist() == full.tolist()


# --- int8 keys and values


def quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 keys or values and their scales."""
    scale = tensor.abs().amax(-1) / 127
    return (tensor / scale[..., None]).round().to(torch.int8), scale.float()


@pytest.mark.parametrize("q_len", [1, 20])
def test_int8_keys_and_values(device: str, backend: str, dtype: torch.dtype, q_len: int) -> None:
    q, k, v = tensors(device, heads=8, kv_heads=2, q_len=q_len, kv_len=150, dim=64)
    (k8, k_scale), (v8, v_scale) = quantize(k), quantize(v)
    # Nothing has been written to keys 140 to 149 of example 0.
    k_scale[0, :, 140:], v_scale[0, :, 140:] = float("nan"), float("inf")
    options = {"prefix_lens": [100, 30], "kv_lens": [140, 150], "q_starts": [140 - q_len, 150 - q_len]}
    ours = prefix_lm_attention(q.to(dtype), k8, v8, k_scale=k_scale, v_scale=v_scale, **on(device, options))
    k, v = (x.double() * scale.double().nan_to_num(0, 0, 0)[..., None] for x, scale in ((k8, k_scale), (v8, v_scale)))
    visible = visible_pairs(2, q_len, 150, **options)
    exact = definition(q.to(dtype).double(), k, v, visible)
    plain = definition(q.to(dtype), k.to(dtype), v.to(dtype), visible)
    assert ours.dtype == dtype
    assert_within(ours, plain, exact)


def test_int8_errors(device: str, backend: str) -> None:
    q, k, v = tensors(device)
    (k8, k_scale), (v8, v_scale) = quantize(k), quantize(v)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    with pytest.raises(TypeError, match="^k_scale: int8 keys and values come with both their scales, others with none"):
        prefix_lm_attention(q, k8, v8)
    with pytest.raises(TypeError, match="^v_scale: int8 keys and values come with both their scales, others with none"):
        prefix_lm_attention(q, k, v, v_scale=v_scale)
    with pytest.raises(TypeError, match="^k: expected float32, float16 or bfloat16, got torch.int8"):
        prefix_lm_attention(q, k8, v, **scales)
    with pytest.raises(ValueError, match=r"^k_scale: expected shape \[2, 2, 6\] .*, got \[2, 2, 5\]"):
        prefix_lm_attention(q, k8, v8, k_scale=k_scale[..., :5], v_scale=v_scale)
    with pytest.raises(TypeError, match="^v_scale: expected float32, got torch.float16"):
        prefix_lm_attention(q, k8, v8, k_scale=k_scale, v_scale=v_scale.half())
    with pytest.raises(RuntimeError, match="no gradients with int8 keys and values"):
        prefix_lm_attention(q.requires_grad_(), k8, v8, **scales)


# --- packed sequences


def packed(device: str, tokens: int, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> list[Tensor]:
    return [randn(tokens, n, dim, device=device) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([5, 1, 7], {}),
        ([5, 1, 7], {"prefix_lens": [3, 0, 7]}),
        ([5, 0, 33, 40], {"prefix_lens": [2, 9, 0, 17], "softcap": 5.0}),
        ([70], {"causal": False}),
        ([30, 40], {"window": 9, "prefix_lens": 4}),
    ],
    ids=str,
)
def test_packed_sequences(
    device: str, backend: str, dtype: torch.dtype, lengths: list[int], options: dict[str, Any]
) -> None:
    """The result equals attention of each sequence alone."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    softcap = options.get("softcap")
    mask = {name: value for name, value in options.items() if name != "softcap"}

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for b, (start, end) in enumerate(zip(ends, ends[1:])):
            one = {**mask}
            if "prefix_lens" in one:
                prefix = one["prefix_lens"]
                one["prefix_lens"] = [prefix if isinstance(prefix, int) else prefix[b]]
            visible = visible_pairs(1, end - start, end - start, **one)
            one_q, one_k, one_v = (tensor[start:end].transpose(0, 1)[None] for tensor in (q, k, v))
            parts.append(definition(one_q, one_k, one_v, visible, softcap=softcap)[0].transpose(0, 1))
        return torch.cat(parts)

    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    arguments = on(device, options)
    assert_accurate(
        lambda q, k, v: prefix_lm_attention_varlen(q, k, v, offsets, max(lengths), **arguments),
        alone,
        packed(device, sum(lengths)),
        dtype,
        order=ORDER,
    )


def pack_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return prefix_lm_attention_varlen(q, k, v, torch.tensor([0, 4, 9], device=q.device), 6, prefix_lens=2)


def test_packed_sequences_take_any_layout(device: str, backend: str) -> None:
    assert_any_layout(pack_of_two, packed(device, 9))
    assert_pure(pack_of_two, packed(device, 9))


@IN_GRAPHS
def test_packed_sequences_compile(device: str, backend: str) -> None:
    assert_compiles(pack_of_two, packed(device, 9))


@pytest.mark.parametrize(
    ("offsets", "longest", "error", "message"),
    [
        ([0, 4, 8], 5, ValueError, r"^cu_seqlens: expected numbers that rise from 0 to T = 9, got \[0, 4, 8\]"),
        ([1, 4, 9], 5, ValueError, r"^cu_seqlens: expected numbers that rise from 0 to T = 9, got"),
        ([0, 6, 4, 9], 6, ValueError, r"^cu_seqlens: expected numbers that rise from 0 to T = 9, got"),
        ([0, 4, 9], 4, ValueError, r"^max_seqlen: got 4, but a sequence has 5 tokens"),
        ([], 4, ValueError, r"^cu_seqlens: expected at least one number, got none"),
        ([0, 9], 9.0, TypeError, r"^max_seqlen: expected an int, got float"),
        ([[0, 9]], 9, ValueError, r"^cu_seqlens: expected shape \[B \+ 1\], got \[1, 2\]"),
    ],
)
def test_packed_errors(offsets: list[int], longest: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prefix_lm_attention_varlen(*packed("cpu", 9), torch.tensor(offsets, dtype=torch.int64), longest)


# --- the C++ extension: a few queries on the CPU


def test_few_queries_of_any_strides() -> None:
    q, k, v = tensors("cpu", q_len=4, kv_len=9, dim=8)
    odd = randn(200).as_strided((2, 4, 4, 8), (32, 8, 1, 1))
    assert torch.equal(prefix_lm_attention(odd, k, v), prefix_lm_attention(odd.contiguous(), k, v))


@pytest.mark.parametrize("q_len", [1, 20])
def test_nan_stays_nan(device: str, backend: str, q_len: int) -> None:
    q, k, v = tensors(device, q_len=q_len, kv_len=24)
    q[0, 1, 0] = torch.nan
    out = prefix_lm_attention(q, k, v)
    assert bool(out[0, 1, 0].isnan().all()) and int(out.isnan().sum()) == q.shape[3]


@needs_extension
def test_few_queries_are_an_op() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = tensors("cpu", q_len=3, kv_len=9)
    arguments = (*inputs, [2, 0, 9, 6] * 2, True, 0.25, None, None)
    torch.library.opcheck(torch.ops.pg_kernels.prefix_lm_attention_few.default, arguments)
    traced = make_fx(lambda q, k, v: prefix_lm_attention(q, k, v, prefix_lens=2))(*inputs)
    assert torch.equal(traced(*inputs), prefix_lm_attention(*inputs, prefix_lens=2))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in inputs]
        assert prefix_lm_attention(*fakes).shape == inputs[0].shape
