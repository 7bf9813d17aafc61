"""A synthetic run: ops, modes, sweeps and statuses, with times from a simple machine model and seeded noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pg_kernels.benchmarks.report.results import Ceilings, Row, Run

CEILINGS = Ceilings(2.6e12, 2.9e12, {"float32": 5.0e13, "bfloat16": 7.0e14, "float16": 7.1e14, "int8": 0.0})
OVERHEAD_S = 5e-6

SPEEDS = {
    "pg_kernels triton": 0.8,
    "pg_kernels reference": 0.3,
    "eager": 0.25,
    "torch.compile": 0.6,
    "SDPA": 0.7,
    "FlexAttention": 0.65,
    "Liger-Kernel": 0.75,
    "bitsandbytes LLM.int8": 0.5,
}
"""Shares of the roofline that each contender reaches."""
PEERS = {
    "rms_norm": ("Liger-Kernel",),
    "geglu_mlp": ("Liger-Kernel",),
    "prefix_lm_attention": ("SDPA", "FlexAttention"),
    "linear_cross_entropy": ("Liger-Kernel",),
    "int8_linear": ("bitsandbytes LLM.int8",),
}


def synthetic_run(**overrides: Any) -> Run:
    """Return a stored run in memory. `overrides` are fields of `Run`."""
    random = np.random.default_rng(0)
    rows = [row for case in _cases() for row in _rows(case, random)]
    run = Run(
        path=Path("runs/synthetic/run.json"),
        device="NVIDIA H100 80GB HBM3",
        device_type="cuda",
        machine={},
        versions={"python": "3.11.9", "torch": "2.13.0", "triton": "3.6.0"},
        commit="0123456789ab",
        command="pytest -q benchmarks/suite --on cuda",
        date="2026-01-02T03:04:05.678901+00:00",
        ceilings=CEILINGS,
        rows=tuple(rows),
    )
    return replace(run, **overrides)


def timed_row(case: str, contender: str, samples: tuple[float, ...], **fields: Any) -> Row:
    """Return a timed row of a case (default: forward rms_norm). As in the suite, names tell whose contender it is."""
    row = Row(
        case=case,
        op="rms_norm",
        mode="forward",
        shape=case,
        sizes={},
        dtype="bfloat16",
        contender=contender,
        ours=contender.startswith("pg_kernels"),
        baseline=contender == "eager",
        status="timed",
        samples=samples,
    )
    return replace(row, **fields)


def _cases() -> Iterator[Row]:
    """Return a pattern of each case's rows, without contender or times."""
    for mode in ("forward", "both"):
        for batch in (1, 4, 8):
            yield _case("rms_norm", mode, {"batch": batch, "tokens": 272, "width": 2048})
        for tokens in (1024, 2048, 4096, 8192):
            yield _case("rms_norm", mode, {"batch": 1, "tokens": tokens, "width": 2048})
        for tokens in (512, 1024, 2048, 4096, 8192):
            yield _case("prefix_lm_attention", mode, {"batch": 1, "queries": tokens, "tokens": tokens, "prefix": 256})
        for vocabulary in (32_000, 64_000, 128_000, 257_152):
            yield _case("linear_cross_entropy", mode, {"tokens": 256, "width": 2048, "vocabulary": vocabulary})
    for batch in (1, 4, 8):
        yield _case("geglu_mlp", "forward", {"batch": batch, "tokens": 272, "width": 2048, "hidden": 16384})
    for rows in (1, 272):
        yield _case("int8_linear", "forward", {"tokens": rows, "inputs": 2048, "outputs": 16384})
    for resolution in (224, 448, 896):
        yield _case("prefill", "forward", {"resolution": resolution, "batch": 1})
    yield _case("rms_norm", "forward", {"batch": 1, "tokens": 272, "width": 2304}, "float32")


def _case(op: str, mode: str, sizes: Mapping[str, int], dtype: str = "bfloat16") -> Row:
    times = 1 if mode == "forward" else 3
    bytes_, flops = (times * amount for amount in _work(op, sizes))
    what = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return timed_row(
        f"{op}-{mode}-{dtype}-{what}",
        "",
        (),
        op=op,
        mode=mode,
        shape=f"paligemma-3b, {what}",
        sizes={"model": "paligemma-3b", **sizes},
        dtype=dtype,
        bytes=bytes_,
        flops=flops,
        arithmetic=dtype if flops else "",
    )


def _work(op: str, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return bytes and FLOPs of one forward pass."""
    tokens, batch, width = sizes.get("tokens", 1), sizes.get("batch", 1), sizes.get("width", 2048)
    if op == "rms_norm":
        return 4 * batch * tokens * width, 0
    if op == "prefix_lm_attention":
        return 2 * tokens * 256 * 18, 4 * 8 * 256 * tokens * (tokens + 256) // 2
    if op == "linear_cross_entropy":
        return 2 * width * (tokens + sizes["vocabulary"]), 2 * tokens * width * sizes["vocabulary"]
    if op == "geglu_mlp":
        return 6 * width * sizes["hidden"] + 4 * batch * tokens * width, 6 * batch * tokens * width * sizes["hidden"]
    if op == "int8_linear":
        return sizes["inputs"] * sizes["outputs"], 2 * tokens * sizes["inputs"] * sizes["outputs"]
    return 5 * 10**9, 5 * 10**9 * (sizes["resolution"] // 14) ** 2


def _rows(case: Row, random: np.random.Generator) -> Iterator[Row]:
    names = ("pg_kernels triton", "pg_kernels reference", "eager", "torch.compile", *PEERS.get(case.op, ()))
    drift = random.uniform(1.0, 1.3, size=20)
    for name in names:
        row = replace(case, contender=name, ours=name.startswith("pg_kernels"), baseline=name == "eager")
        if name.startswith("bitsandbytes") or (name == "Liger-Kernel" and case.op != "rms_norm"):
            yield replace(row, status="skipped", reason=f"{name} is not installed")
        elif name == "torch.compile" and case.op == "int8_linear":
            yield replace(row, status="failed", reason="unsupported: int | bfloat16")
        elif name == "FlexAttention" and case.mode == "both":
            yield replace(row, status="wrong", reason="its output is 7 times as far off as allowed", error=7.0)
        else:
            # Nothing is faster than its launch overhead, and ours loses on tiny cases.
            speed = SPEEDS[name] * (0.2 if row.ours and case.sizes.get("tokens") == 1 else 1.0)
            seconds = OVERHEAD_S + CEILINGS.bound_s(case) / speed
            samples = seconds * drift * random.normal(1.0, 0.04, size=20).clip(0.8)
            yield replace(row, samples=tuple(samples), error=0.25, overhead_s=OVERHEAD_S, peak_bytes=3 << 19)
