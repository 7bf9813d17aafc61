"""Attention over infinity and NaN.

If a query sees them its output is that of softmax. If it does not see them they do not change its output.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import randn
from torch import Tensor

from pg_kernels import backend as use_backend
from pg_kernels import prefix_lm_attention, prefix_lm_attention_varlen

OP = "prefix_lm_attention"
GARBAGE = [float("inf"), float("-inf"), float("nan")]


def definition(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softcap: float | None = None) -> Tensor:
    """Compute in float64 each query [B, H, 1, D] over its visible keys only; `visible` is [Sq, Skv]."""
    rows = []
    for i, keys in enumerate(visible.to(q.device)):
        scores = q[:, :, i : i + 1].double() @ k[:, :, keys].double().mT * q.shape[3] ** -0.5
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        rows.append(scores.softmax(-1) @ v[:, :, keys].double())
    return torch.cat(rows, 2)


def check(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, **options: Any) -> None:
    """Check the output with and without gradients, which run different kernels on the CPU."""
    expected = definition(q, k, v, visible, options.get("softcap")).to(q.dtype)
    for needs_grad in (False, True):
        out = prefix_lm_attention(q.clone().requires_grad_(needs_grad), k, v, **options)
        torch.testing.assert_close(out.detach(), expected, equal_nan=True, rtol=2e-3, atol=2e-3)


def tensors(device: str, q_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (randn(1, 1, length, 16, device=device) for length in (q_len, kv_len, kv_len))
    return q, k, v


@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
@pytest.mark.parametrize("q_len", [1, 3, 17])
def test_garbage_that_a_query_sees(device: str, backend: str, q_len: int, garbage: float) -> None:
    """Softmax is NaN, and so is the output, for a score of NaN, a score of +inf, or scores of −inf only."""
    for keys in (1, 4):
        visible = torch.ones(q_len, keys, dtype=torch.bool)
        for which in range(3):
            for softcap in (None, 5.0):
                inputs = tensors(device, q_len, keys)
                inputs[which][0, 0, 0, 0] = garbage
                check(*inputs, visible, causal=False, softcap=softcap)
    q, k, v = tensors(device, q_len, 3)
    check(q, k.fill_(garbage), v, torch.ones(q_len, 3, dtype=torch.bool), causal=False)


@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
@pytest.mark.parametrize("q_len", [2, 17])
def test_garbage_that_a_query_does_not_see(device: str, backend: str, q_len: int, garbage: float) -> None:
    """Only the last query sees the last key of causal attention; a window of two hides the first key."""
    position, key = torch.arange(20 - q_len, 20)[:, None], torch.arange(20)[None]
    for place, options in ((19, {}), (0, {"window": 2}), (19, {"softcap": 5.0})):
        # The Triton kernels multiply hidden values of a tile by 0: skip them, 0 · NaN is NaN.
        for which in (1,) if backend == "triton" else (1, 2):
            inputs = tensors(device, q_len, 20)
            inputs[which][0, 0, place, 3:5] = garbage
            visible = (key <= position) & (position - key < options.get("window", 20))
            check(*inputs, visible, **options)

            # Gradients of the queries that do not see the garbage. The Triton kernels multiply hidden keys by 0: skip them.
            if which == 1 and backend == "triton":
                continue
            q = inputs[0].requires_grad_()
            unaffected = ~visible[:, place]
            out = prefix_lm_attention(q, *inputs[1:], **options)[:, :, unaffected]
            (gradient,) = torch.autograd.grad(out.sum(), q)
            expected = definition(q, *inputs[1:], visible, options.get("softcap"))[:, :, unaffected]
            (wanted,) = torch.autograd.grad(expected.sum(), q)
            torch.testing.assert_close(
                gradient[:, :, unaffected], wanted[:, :, unaffected].to(q.dtype), rtol=2e-3, atol=2e-3
            )


@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
def test_one_query_and_keys_of_many_programs(device: str, backend: str, garbage: float) -> None:
    """A window hides the first keys of a static cache so long that several programs share its keys."""
    q, k, v = tensors(device, 1, 320)
    visible = torch.arange(320)[None] > 319 - 150
    k[0, 0, :170, 2] = garbage
    if backend != "triton":
        v[0, 0, 169, 2] = garbage
    check(q, k, v, visible, window=150)
    check(q, k.fill_(float("-inf")).copysign(-q), v, visible, window=150)


@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
def test_other_sequences_and_scales(device: str, backend: str, garbage: float) -> None:
    q, k, v = (randn(9, 1, 16, device=device) for _ in range(3))
    offsets = torch.tensor([0, 4, 9], device=device)
    with use_backend("reference"):
        expected = prefix_lm_attention_varlen(q, k, v, offsets, 5)
    for tensor in (q, k, v):
        tensor[4:] = garbage
        q.requires_grad_()
        out = prefix_lm_attention_varlen(q, k, v, offsets, 5)
        torch.testing.assert_close(out[:4], expected[:4])
        (gradient,) = torch.autograd.grad(out[:4].sum(), q)
        assert gradient[:4].isfinite().all()
        q = q.detach()

    q = randn(1, 1, 20, 16, device=device)
    quantized = torch.randint(-127, 128, (1, 1, 20, 16), dtype=torch.int8, device=device)
    scales = [torch.full((1, 1, 20), 0.01, device=device) for _ in range(2)]
    for scale in scales[:1] if backend == "triton" else scales:
        scale[..., -1] = garbage
    out = prefix_lm_attention(q, quantized, quantized, k_scale=scales[0], v_scale=scales[1])
    values = quantized * 0.01
    visible = torch.ones(19, 19, dtype=torch.bool).tril()
    expected = definition(q[:, :, :19], values[:, :, :19], values[:, :, :19], visible)
    torch.testing.assert_close(out[:, :, :19], expected.float())
    if backend != "triton":  # there only k has garbage, and a key of −inf has no weight
        assert not out[:, :, 19].isfinite().any()


@pytest.mark.parametrize("scale", [None, 4.0])
def test_gradients_of_very_negative_scores(device: str, backend: str, dtype: torch.dtype, scale: float | None) -> None:
    """Padding keys load as 0 and have scores of 0. Relative to very negative scores their exponentials are infinite."""
    signs = torch.tensor([1.6, -1.6, 0.0], device=device)
    q, k, v = ((randn(1, 2, 64, 64, device=device) * 0.1 + sign).to(dtype).requires_grad_() for sign in signs)
    out = prefix_lm_attention(q, k, v, kv_lens=40, scale=scale)
    gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    for gradient in gradients:
        assert gradient.isfinite().all()
    assert not gradients[1][:, :, 40:].any() and not gradients[2][:, :, 40:].any() and gradients[2].any()
