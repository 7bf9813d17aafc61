"""Registered ops pass addresses to the C++ extension, so they refuse wrong arguments even if called directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import needs_extension

from pg_kernels import int8_geglu, int8_projections, int8_topk, pack_int8, prefix_lm_attention, rms_norm
from pg_kernels.ops.int8_linear import cpu

pytestmark = needs_extension

N, K, S, D = 17, 6, 3, 4
QWEIGHT = torch.ones(N, K, dtype=torch.int8)
SCALE = torch.ones(N, 1)


def layout() -> tuple[Any, Any]:
    return cpu.pack(QWEIGHT, SCALE, K)


def calls() -> dict[str, dict[str, Any]]:
    """Return valid arguments of every op that passes addresses."""
    data, scale = layout()
    x, heads = torch.ones(2, K), torch.ones(1, 2, S, D)
    weight: dict[str, Any] = {"n": N, "group_size": K}
    return {
        "rms_norm_native": {"x": x, "residual": x, "weight": x[0], "eps": 1e-6, "weight_offset": 1.0},
        "geglu_native": {"gate": x, "up": x},
        "geglu_native_backward": {"grad": x, "gate": x, "up": x, "with_product": True},
        "quantize_int8_native": {"weight": x, "group_size": 2},
        "pack_int8": {"qweight": QWEIGHT, "scale": SCALE, "group_size": K},
        "unpack_int8": {"data": data, "scale": scale, "k": K, **weight},
        "int8_rows": {"data": data, "scale": scale, "indices": torch.tensor([0, 16]), "k": K, **weight},
        "int8_linear": {
            **{"x": x, "weight": data, "scale": scale, "bias": torch.ones(N), **weight, "int8_activations": False},
            **{"backend": "native", "out_dtype": torch.float32},
        },
        "int8_linear_backward": {
            **{"grad": torch.ones(2, N), "weight": data, "scale": scale, "columns": K, "group_size": K},
            "backend": "native",
        },
        "int8_projections": {
            **{"x": x, "weights": [data], "scales": [scale], "biases": [None], "sizes": [N], "group_size": K},
            "int8_activations": False,
        },
        "int8_geglu": {
            **{"x": x, "gate": data, "gate_scale": scale, "up": data, "up_scale": scale, **weight},
            **{"int8_activations": False, "backend": "native"},
        },
        "int8_topk": {
            **{"x": x, "weight": data, "scale": scale, **weight, "int8_activations": False},
            **{"k": 2, "softcap": None, "log_probs": False, "backend": "native"},
        },
        "apply_rotary_to_cache_native": {
            **{"q": heads, "k": heads, "v": heads, "positions": torch.arange(S)[None], "theta": 1e4},
            **{"k_cache": heads.clone(), "v_cache": heads.clone(), "cache_positions": torch.arange(S)[None]},
        },
        "prefix_lm_attention_few": {
            **{"q": heads, "k": heads, "v": heads, "examples": [0, 0, S, 0]},
            **{"causal": True, "scale": 1.0, "softcap": None, "window": None},
        },
    }


def damages(value: Any) -> dict[str, Any]:
    """Return tensors that no op may accept instead of `value`."""
    return {
        "no tensor": None,
        "sparse": value.to_sparse(),
        "complex": value.to(torch.complex64),
        "another rank": value[None, None],
        "shorter": value[..., :-1],
        "empty": value[:0],
        "longer": torch.cat((value, value, value), -1),
    }


CASES = [
    (op, argument, damage)
    for op, arguments in (calls() if cpu._C is not None else {}).items()
    for argument, value in arguments.items()
    for given in [value[0] if isinstance(value, list) else value]
    if isinstance(given, torch.Tensor)
    for damage in damages(given)
    # Optional tensors may be None, and any number of rows or indices is valid.
    if (op, argument, damage)
    not in {
        *(("int8_linear", "bias", "no tensor"), ("rms_norm_native", "residual", "no tensor")),
        *(("int8_rows", "indices", size) for size in ("shorter", "empty", "longer")),
        *((op, "x", "empty") for op in ("int8_linear", "int8_projections", "int8_geglu", "int8_topk")),
        *(("quantize_int8_native", "weight", size) for size in ("shorter", "empty", "longer")),
        # grad may have no rows, and fewer columns: the layout pads N to whole blocks.
        *(("int8_linear_backward", "grad", size) for size in ("shorter", "empty")),
    }
]


@pytest.mark.parametrize(("op", "argument", "damage"), CASES)
def test_a_damaged_tensor_is_refused(op: str, argument: str, damage: str) -> None:
    arguments = calls()[op]
    good = arguments[argument]
    wrong = damages(good[0] if isinstance(good, list) else good)[damage]
    arguments[argument] = [wrong] if isinstance(good, list) else wrong
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"^\w+: |argument|Could not run 'pg_kernels"):
        getattr(torch.ops.pg_kernels, op)(**arguments)


@pytest.mark.parametrize("op", calls() if cpu._C is not None else [])
def test_sizes_beyond_the_tensors_are_refused(op: str) -> None:
    getattr(torch.ops.pg_kernels, op)(**calls()[op])
    for argument, value in calls()[op].items():
        if argument in ("n", "k", "columns", "group_size", "sizes", "backend") and not isinstance(value, torch.Tensor):
            wrong = {"sizes": [2**31], "backend": "x"}.get(argument, 2**31)
            with pytest.raises(ValueError, match=r"^\w+: "):
                getattr(torch.ops.pg_kernels, op)(**calls()[op] | {argument: wrong})


@pytest.mark.parametrize("examples", [[], [0, 0, S + 1, 0], [0, -1, S, 0], [0, 0, S, 0] * 2], ids=str)
def test_keys_beyond_the_tensor_are_refused(examples: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^examples: expected 4 lengths for each of 1, with keys in \[0, 3\]"):
        torch.ops.pg_kernels.prefix_lm_attention_few(**calls()["prefix_lm_attention_few"] | {"examples": examples})


def test_sparse_and_nested_tensors_are_named() -> None:
    x, packed = torch.ones(2, K), pack_int8(QWEIGHT, SCALE)
    sparse = x.to_sparse()
    for call in (
        lambda: int8_geglu(sparse, packed, packed),
        lambda: int8_projections(sparse, [packed]),
        lambda: int8_topk(sparse, packed),
        lambda: rms_norm(sparse, x[0]),
        lambda: rms_norm(torch.nested.nested_tensor([x], layout=torch.jagged), x[0]),
    ):
        with pytest.raises(TypeError, match=r"^x: expected a dense tensor, got "):
            call()
    with pytest.raises(TypeError, match=r"^residual: expected a dense tensor, got torch.sparse_coo"):
        rms_norm(x, x[0], residual=sparse)


@pytest.mark.parametrize("wrong", [None, 3, "x", (QWEIGHT, SCALE)], ids=str)
def test_wrong_weights_are_named(wrong: Any) -> None:
    x, packed = torch.ones(2, K), pack_int8(QWEIGHT, SCALE)
    with pytest.raises(TypeError, match=r"^gate: expected one that pack_int8 has packed, got "):
        int8_geglu(x, wrong, packed)
    with pytest.raises(TypeError, match=r"^up: expected one that pack_int8 has packed, got "):
        int8_geglu(x, packed, wrong)
    with pytest.raises(TypeError, match=r"^weights?: expected "):
        int8_projections(x, wrong)
    with pytest.raises(TypeError, match=r"^biases: expected a list or a tuple, got "):
        int8_projections(x, [packed], x[0])


@pytest.mark.parametrize(
    ("number", "error"),
    [("x", TypeError), (True, TypeError), (1j, TypeError), (torch.ones(2), TypeError), (1e-320, ValueError)]
    + [(float("inf"), ValueError)],
    ids=str,
)
def test_wrong_numbers_are_named(number: Any, error: type[Exception]) -> None:
    x, q = torch.ones(2, K), torch.ones(1, 1, S, D)
    with pytest.raises(error, match=r"^eps: expected a number"):
        rms_norm(x, x[0], number)
    with pytest.raises(error, match=r"^softcap: expected a number"):
        int8_topk(x, pack_int8(QWEIGHT, SCALE), softcap=number)
    with pytest.raises(error, match=r"^scale: expected a number"):
        prefix_lm_attention(q, q, q, scale=number)
