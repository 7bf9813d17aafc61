"""The suite's engine: which contenders are timed, which are not and why, and what is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pg_kernels.backends import available
from pg_kernels.benchmarks.cases.catalogue import MODES, OPS, WHOLE_MODEL_OPS, Case, select
from pg_kernels.benchmarks.cases.ops import OPS as DEFINED
from pg_kernels.benchmarks.cases.ops import Draw, dense_mask, visible_pairs
from pg_kernels.benchmarks.contenders import ops as contenders
from pg_kernels.benchmarks.contenders.ops import COMPILED, PEERS, Contender
from pg_kernels.benchmarks.measure import machine
from pg_kernels.benchmarks.measure.machine import ceilings
from pg_kernels.benchmarks.measure.runner import Plan, Suite
from pg_kernels.benchmarks.measure.timing import Effort, TimedCall, interleave, peak_bytes
from pg_kernels.benchmarks.measure.trial import OpTrial
from pg_kernels.benchmarks.report.results import Ceilings, Row

CPU = torch.device("cpu")
SHORT = Effort(0.0, 3, 3)
PLAN = Plan(ops=SHORT, models=SHORT, longest_s=10.0)
LIMITS = Ceilings(1e10, 1e10, {"float32": 1e11, "bfloat16": 1e11})
NORM = {"batch": 2, "tokens": 5, "width": 64}
SMALL: dict[str, dict[str, Any]] = {
    "rms_norm": NORM,
    "add_rms_norm": NORM,
    "layer_norm": NORM,
    "apply_rotary": {"batch": 2, "tokens": 5, "heads": 4, "kv_heads": 2, "head_dim": 32},
    "geglu": {"batch": 2, "tokens": 5, "hidden": 64},
    "geglu_mlp": {**NORM, "hidden": 96},
    "prefix_lm_attention": {
        "batch": 2, "queries": 24, "tokens": 24, "prefix": 9, "heads": 4, "kv_heads": 2, "head_dim": 32,
    },
    "linear_cross_entropy": {"tokens": 7, "width": 64, "vocabulary": 200},
    "int8_linear": {"tokens": 5, "inputs": 64, "outputs": 96},
    "quantize_int8": {"inputs": 64, "outputs": 96},
}  # fmt: skip
OPS_AND_MODES = [(op, mode) for op in OPS for mode in (MODES if DEFINED[op].trained else ("forward",))]
DEVICES = ["cpu", *[pytest.param("cuda", marks=pytest.mark.cuda)] * torch.cuda.is_available()]
DECODE = {**SMALL["prefix_lm_attention"], "queries": 1}
SIGLIP = {**SMALL["prefix_lm_attention"], "kv_heads": 4, "prefix": 24, "causal": 0}


def case(op: str, mode: str = "forward", dtype: str = "bfloat16", sizes: Mapping[str, Any] | None = None) -> Case:
    return Case(op, mode, dtype, "small", SMALL[op] if sizes is None else sizes)


def run(wanted: Case, plan: Plan = PLAN, device: str = "cpu") -> dict[str, Row]:
    return {row.contender: row for row in Suite(torch.device(device), plan, LIMITS).run(wanted)}


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds, so only one test does it."""
    monkeypatch.setattr(contenders, "_compile", lambda function: function)


# --- every contender


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("op, mode", OPS_AND_MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_contender_of_every_op_is_right_or_says_why_not(device: str, op: str, mode: str, dtype: str) -> None:
    rows = run(case(op, mode, dtype), device=device)
    assert {row.status for row in rows.values()} <= {"timed", "skipped"}, rows
    assert rows["eager"].status == "timed" and rows["eager"].baseline
    ours = [row for row in rows.values() if row.ours]
    registered = "rms_norm" if op == "add_rms_norm" else op
    assert [row.contender for row in ours if "W8A8" not in row.contender] == [
        f"pg_kernels {name}" for name in available(registered, device)
    ]
    for row in rows.values():
        if row.status == "timed":
            assert len(row.samples) == 3 and min(row.samples) > 0
            assert row.error is not None and row.error <= 1
            assert row.peak_bytes is not None
        else:
            assert row.reason and not row.samples


@pytest.mark.parametrize("op, mode", OPS_AND_MODES)
def test_plain_pytorch_is_the_definition(op: str, mode: str) -> None:
    """Contenders may lose twice what the baseline loses, so the baseline must lose only rounding."""
    trial = OpTrial(case(op, mode, "float32"), CPU)
    trial.draw()
    results = trial.build(Contender("eager", DEFINED[op].eager))[0].results()
    for result, true in zip(results, trial.truth, strict=True):
        torch.testing.assert_close(result.double(), true.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("sizes", [DECODE, SIGLIP, {**DECODE, "softcap": 50}], ids=["decode", "siglip", "softcap"])
def test_attention_contenders_in_its_other_uses(sizes: dict[str, Any]) -> None:
    rows = run(case("prefix_lm_attention", sizes=sizes))
    assert {row.status for row in rows.values()} <= {"timed", "skipped"}, rows
    assert rows["FlexAttention"].status == "timed"
    assert rows["SDPA"].status == ("skipped" if "softcap" in sizes else "timed")
    assert rows["SDPA cuDNN"].reason == "needs a CUDA GPU"


def test_compiled_code_takes_part() -> None:
    assert run(case("geglu"))[COMPILED].status == "timed"


def test_a_sweep_is_run_by_our_default_and_the_baseline() -> None:
    rows = Suite(CPU, PLAN, LIMITS).run(replace(case("rms_norm"), sweep=True))
    assert [row.contender for row in rows] == [f"pg_kernels {available('rms_norm', 'cpu')[0]}", "eager"]


# --- who is not timed


def run_with(monkeypatch: pytest.MonkeyPatch, peer: Contender, mode: str = "forward", plan: Plan = PLAN) -> Row:
    monkeypatch.setattr(contenders, "_compile", lambda function: function)
    monkeypatch.setitem(PEERS, "rms_norm", (peer,))
    return run(case("rms_norm", mode), plan)[peer.name]


def test_a_wrong_contender_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_offset(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)

    row = run_with(monkeypatch, Contender("wrong", lambda inputs: partial(without_offset, **inputs)))
    assert row.status == "wrong" and row.error is not None and row.error > 10
    assert "times as far off as allowed" in row.reason and not row.samples


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_wrong(monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    def poisoned(x: Tensor, weight: Tensor) -> Tensor:
        out = DEFINED["rms_norm"].eager({"x": x, "weight": weight})()
        out[0, 0, 0] = bad
        return out

    row = run_with(monkeypatch, Contender("poisoned", lambda inputs: partial(poisoned, **inputs)))
    assert row.status == "wrong"


def test_another_shape_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_with(monkeypatch, Contender("short", lambda inputs: lambda: inputs["x"][:1])).status == "wrong"


def test_a_wrong_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
        right = DEFINED["rms_norm"].eager(inputs)
        return lambda: right() + (inputs["x"] - inputs["x"].detach())

    assert run_with(monkeypatch, Contender("leaky", build)).status == "timed"
    for mode in ("backward", "both"):
        assert run_with(monkeypatch, Contender("leaky", build), mode).status == "wrong"


def test_a_failing_contender_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(x: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("first line\nsecond line")

    row = run_with(monkeypatch, Contender("broken", lambda inputs: partial(explode, **inputs)))
    assert (row.status, row.reason) == ("failed", "first line")


def test_reasons_to_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = DEFINED["rms_norm"].eager
    missing = run_with(monkeypatch, Contender("peer", eager, "no_such_package"))
    assert (missing.status, missing.reason) == ("skipped", "no_such_package is not installed")
    assert run_with(monkeypatch, Contender("peer", eager, device_type="cuda")).reason == "needs a CUDA GPU"

    def refuse(inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
        raise ValueError("has no softcap")

    refused = run_with(monkeypatch, Contender("peer", refuse))
    assert (refused.status, refused.reason) == ("skipped", "has no softcap")
    late = replace(PLAN, deadline_s=0.0)
    time.sleep(0.01)
    assert "0 s were over" in run_with(monkeypatch, Contender("peer", eager), plan=late).reason
    slow = replace(PLAN, longest_s=0.0)
    assert "the limit is 0 s" in run_with(monkeypatch, Contender("peer", eager), plan=slow).reason


def test_what_does_not_fit_into_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pg_kernels.benchmarks.measure.runner.free_bytes", lambda device: 1000)
    rows = run(case("rms_norm"))
    assert {row.status for row in rows.values()} == {"skipped"}
    assert "are free" in rows["eager"].reason


# --- timing


def test_contenders_take_turns_and_rotate_their_inputs() -> None:
    calls: list[str] = []

    def task(name: str) -> TimedCall:
        return TimedCall(lambda state: calls.append(name))

    tasks = {name: [task(f"{name}{i}") for i in range(2)] for name in "ab"}
    samples = interleave(tasks, CPU, Effort(0.0, 4, 9))
    rounds = [calls[i : i + 2] for i in range(0, len(calls), 2)]  # the first call is not timed
    assert [sorted(one) for one in rounds] == [["a0", "b0"], ["a1", "b1"]] * 2 + [["a0", "b0"]]
    assert {one[0][0] for one in rounds} == {"a", "b"}  # no contender always follows the other
    assert {name: len(found.device_s) for name, found in samples.items()} == {"a": 4, "b": 4}


def test_rounds_go_on_until_the_budget_is_used() -> None:
    tasks = {"a": [TimedCall(lambda state: time.sleep(0.01))]}
    assert 3 <= len(interleave(tasks, CPU, Effort(0.05, 1, 100))["a"].device_s) <= 8
    assert len(interleave(tasks, CPU, Effort(10.0, 1, 4))["a"].device_s) == 4


def test_only_run_is_timed() -> None:
    tasks = {"a": [TimedCall(lambda state: time.sleep(state), prepare=lambda: time.sleep(0.05) or 0.002)]}
    (sample,) = interleave(tasks, CPU, Effort(0.0, 1, 1))["a"].device_s
    assert 0.002 <= sample < 0.05


def test_peak_memory_counts_what_is_held_at_once() -> None:
    x = torch.zeros(1 << 18)

    def call() -> Tensor:
        first = x + 1  # 1 MiB
        second = first + 1  # both: 2 MiB
        del first
        return second + 1  # 2 MiB again

    assert 0 <= peak_bytes(call, CPU) - (2 << 20) < 1000  # the added numbers are tensors, too
    assert peak_bytes(lambda: x.add_(1), CPU) < 1000


def test_inputs_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pg_kernels.benchmarks.measure.trial.cache_bytes", lambda device: 10_000)
    trial = OpTrial(case("geglu"), CPU)  # 2 * 2 * 5 * 64 * 2 bytes
    trial.draw()
    sets = [inputs["gate"] for inputs in trial.sets]
    assert 2 * 10_000 <= trial.input_bytes * len(sets) < 3.5 * 10_000
    assert len({tensor.data_ptr() for tensor in sets}) == len(sets)
    for tensor in sets[1:]:
        torch.testing.assert_close(tensor, sets[0], rtol=0, atol=0)


def test_ceilings_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine._SIDES, "cpu", 256)
    found = ceilings(CPU)
    assert 5e8 < found.copy_bytes_per_s < 1e13 and 5e8 < found.read_bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s["float32"] < 1e14
    row = run(case("geglu_mlp"))["eager"]
    assert Ceilings(1e9, 2e9, {"bfloat16": 1e9}).bound_s(row) == pytest.approx(row.flops / 1e9)
    assert Ceilings(1e3, 2e3, {"bfloat16": 1e15}).bound_s(row) == pytest.approx(row.bytes / 2e3)


# --- what is counted


@pytest.mark.parametrize("op, mode", [(op, mode) for op, mode in OPS_AND_MODES if DEFINED[op].flops])
def test_flops_are_those_of_the_matrix_products(op: str, mode: str) -> None:
    # Masks do not reduce an eager product.
    full = {**SMALL[op], "prefix": 24} if op == "prefix_lm_attention" else SMALL[op]
    trial = OpTrial(case(op, mode, "float32", full), CPU)
    trial.draw()
    task = trial.build(Contender("eager", DEFINED[op].eager))[0].task
    state = task.prepare()
    with FlopCounterMode(display=False) as counter:
        task.run(state)
    assert counter.get_total_flops() == trial.work(trial.contenders()[0])[1]


def test_bytes_are_inputs_outputs_and_gradients() -> None:
    x, weight = 2 * 5 * 64 * 2, 64 * 2
    forward, backward = x + weight + x, x + weight + x + x + weight
    for mode, expected in (("forward", forward), ("backward", backward), ("both", forward + backward)):
        trial = OpTrial(case("rms_norm", mode), CPU)
        assert trial.work(trial.contenders()[0]) == (expected, 0)
    int8 = OpTrial(case("int8_linear", sizes={"tokens": 5, "inputs": 64, "outputs": 96, "group": 32}), CPU)
    assert int8.work(int8.contenders()[0])[0] == 5 * 64 * 2 + 96 * 64 + 96 * 2 * 4 + 5 * 96 * 2


@pytest.mark.parametrize("sizes", [SMALL["prefix_lm_attention"], DECODE, SIGLIP])
def test_visible_pairs_are_the_masks(sizes: dict[str, Any]) -> None:
    inputs = DEFINED["prefix_lm_attention"].draw(sizes, Draw(torch.float32, CPU))
    mask = dense_mask(inputs)
    assert visible_pairs(sizes) == (sizes["queries"] * sizes["tokens"] if mask is None else int(mask.sum()))


# --- the list of cases


def test_every_op_has_every_mode_and_every_model() -> None:
    cases = select(full=True)
    assert len({case.name for case in cases}) == len(cases)
    for op in OPS:
        found = [case for case in cases if case.op == op]
        modes = MODES if DEFINED[op].trained else ("forward",)
        assert {case.mode for case in found} == set(modes), op
        assert any(case.quick for case in found), op
    for op in WHOLE_MODEL_OPS:
        assert {case.sizes["batch"] for case in cases if case.op == op} == {1, 4, 8, 16, 32}
    assert {case.sizes.get("model") for case in cases} >= {"paligemma-3b", "paligemma2-10b", "paligemma2-28b"}
    assert {case.op for case in select(full=False)} == {*OPS, *WHOLE_MODEL_OPS} - {"generate", "finetune_step"}


def test_every_case_can_be_made() -> None:
    for case in select(full=True, whole_models=False):
        trial = OpTrial(case, CPU)
        bytes_, flops = trial.work(trial.contenders()[0])
        assert bytes_ > 0 and flops >= 0 and trial.needed_bytes() > trial.input_bytes


def test_cases_are_selected_by_op_and_the_quick_ones_come_first() -> None:
    assert {case.op for case in select(full=True, ops=("geglu",))} == {"geglu"}
    quick = [case.quick for case in select(full=True)]
    assert quick == sorted(quick, reverse=True)
    assert not any(case.op in WHOLE_MODEL_OPS for case in select(full=True, whole_models=False))
