"""Trials: a case with drawn inputs, built contenders and judged outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from pg_kernels import backend
from pg_kernels.benchmarks.cases.catalogue import Case
from pg_kernels.benchmarks.cases.ops import OPS, Build, Draw, Inputs
from pg_kernels.benchmarks.contenders.ops import Contender, contenders
from pg_kernels.benchmarks.measure.machine import cache_bytes
from pg_kernels.benchmarks.measure.timing import Candidate, TimedCall

MAX_INPUT_SETS = 64
_OVERHEAD_CALLS = 50


class Trial(Protocol):
    """The runner's interface to a case. Before `draw` only contenders and counts are available."""

    wall: bool
    """Whether the time includes waiting for the host."""

    def contenders(self) -> list[Contender]:
        """Return all contenders."""

    def work(self, contender: Contender) -> tuple[int, int]:
        """Return bytes and FLOPs of the definition, with weights of the contender's kind."""

    def setup(self) -> tuple[int, int]:
        """Return bytes and FLOPs of the work that every contender does once before it is timed."""

    def needed_bytes(self) -> int:
        """Return an estimate of the memory for drawing and judging."""

    def draw(self) -> None:
        """Draw the inputs, and compute the values that outputs are compared with."""

    def build(self, contender: Contender) -> list[Candidate]:
        """Build a contender several times on different memory. Raises ValueError for inputs that it does not support."""

    def error(self, contender: Contender, results: list[Tensor]) -> float:
        """Return the deviation of results from the definition's, in units of the allowed deviation: above 1 they are wrong."""

    def overhead_s(self, contender: Contender) -> float | None:
        """Return the cost of a call with tiny inputs, in seconds; None if there is no such number."""


class OpTrial:
    """A case of one op."""

    wall = False

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.op = OPS[case.op]
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        shapes = self.op.draw(case.sizes, Draw(self.dtype, torch.device("meta")))
        self.input_bytes = _bytes(shapes)
        self.gradient_bytes = sum(shapes[name].nbytes for name in self.op.trained)
        self.output_bytes = self.op.outputs(case.sizes) * self.dtype.itemsize
        self.sets: list[dict[str, Any]] = []

    def contenders(self) -> list[Contender]:
        return contenders(self.case.op, self.device.type, sweep=self.case.sweep)

    def work(self, contender: Contender) -> tuple[int, int]:
        """Count every input read once and every output written once. A backward reads the inputs and the outputs' gradients."""
        read = self.op.input_bytes(self.case.sizes) if self.op.input_bytes else self.input_bytes
        forward, backward = read + self.output_bytes, read + self.output_bytes + self.gradient_bytes
        flops = self.op.flops(self.case.sizes) if self.op.flops else 0
        return {
            "forward": (forward, flops),
            "backward": (backward, 2 * flops),
            "both": (forward + backward, 3 * flops),
        }[self.case.mode]

    def setup(self) -> tuple[int, int]:
        return 0, 0

    def needed_bytes(self) -> int:
        # The truth is twice as wide. Gradients exist of the truth and of the compared results, and once more while they are
        # summed.
        gradients = 0 if self.case.mode == "forward" else 8 * self.gradient_bytes
        wide = 2 * (self.input_bytes + self.output_bytes)
        return self._num_sets() * self.input_bytes + wide + gradients + 16 * self.op.scratch(self.case.sizes)

    def draw(self) -> None:
        first = self.op.draw(self.case.sizes, Draw(self.dtype, self.device))
        self.sets = [self._leaves(first)]
        for _ in range(self._num_sets() - 1):
            copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in first.items()}
            self.sets.append(self._leaves(copies))
        reference = _on_reference(self.op.ours, self.sets[0])
        outputs = _as_list(_without_gradients(reference))
        self.cotangents = [torch.randn_like(out) if out.is_floating_point() else out for out in outputs]
        inputs = self._leaves({name: self._widen(value) for name, value in first.items()})
        self.truth = self._results(_on_reference(self.op.definition or self.op.ours, inputs), inputs)
        low = [self._results(reference, self.sets[0]), self._results(self.op.eager(self.sets[0]), self.sets[0])]
        self.allowed = [_allowance(rounded, true, self.dtype) for true, *rounded in zip(self.truth, *low, strict=True)]

    def build(self, contender: Contender) -> list[Candidate]:
        return [self._candidate(contender, inputs) for inputs in self.sets]

    def error(self, contender: Contender, results: list[Tensor]) -> float:
        if [out.shape for out in results] != [true.shape for true in self.truth]:
            return math.inf
        errors = [
            float((out.to(true.dtype) - true).abs().max()) / allowed
            for out, true, allowed in zip(results, self.truth, self.allowed)
        ]
        return math.inf if any(math.isnan(error) for error in errors) else max(errors)

    def overhead_s(self, contender: Contender) -> float | None:
        if self.device.type == "cuda":
            return None  # measured in the rounds, while the device is busy
        inputs = self._leaves(self.op.draw(self.op.tiny, Draw(self.dtype, self.device)))
        try:
            task = self._candidate(contender, inputs).task
            task.run(task.prepare())
        except (ValueError, RuntimeError):
            return None  # some contenders have a smallest shape
        times = []
        for _ in range(_OVERHEAD_CALLS):
            state = task.prepare()
            start = perf_counter()
            task.run(state)
            times.append(perf_counter() - start)
        return median(times)

    def _num_sets(self) -> int:
        """Return the number of input sets that together are twice as large as the cache."""
        wanted = math.ceil(2 * cache_bytes(self.device) / max(self.input_bytes, 1)) + 1
        return min(wanted, MAX_INPUT_SETS)

    def _leaves(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        trained = self.op.trained if self.case.mode != "forward" else ()
        return {name: value.detach().requires_grad_() if name in trained else value for name, value in inputs.items()}

    def _widen(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(torch.float64 if self.dtype == torch.float32 else torch.float32)

    def _candidate(self, contender: Contender, inputs: Inputs) -> Candidate:
        run = contender.build(inputs)
        return Candidate(self._task(run, inputs), lambda: self._results(run, inputs))

    def _task(self, run: Callable[[], Any], inputs: Inputs) -> TimedCall:
        if self.case.mode == "forward":
            return TimedCall(lambda _: _without_gradients(run))
        leaves = [inputs[name] for name in self.op.trained]
        if self.case.mode == "both":
            return TimedCall(lambda _: self._gradients(run(), leaves))
        return TimedCall(lambda outputs: self._gradients(outputs, leaves), prepare=run)

    def _results(self, run: Callable[[], Any], inputs: Inputs) -> list[Tensor]:
        """Return the outputs, and in backward modes the gradients."""
        if self.case.mode == "forward":
            return _as_list(self.op.comparable(_without_gradients(run)))
        outputs = _as_list(run())
        gradients = self._gradients(outputs, [inputs[name] for name in self.op.trained])
        return [*(out.detach() for out in outputs), *gradients]

    def _gradients(self, outputs: Any, leaves: Sequence[Tensor]) -> list[Tensor]:
        outputs = _as_list(outputs)
        # The case's gradients do not fit the tiny shape at which overhead is measured.
        cotangents = [
            given.to(out.dtype) if given.shape == out.shape else out.detach()
            for given, out in zip(self.cotangents, outputs, strict=True)
        ]
        return list(torch.autograd.grad(outputs, leaves, cotangents))


def _on_reference(build: Build, inputs: Inputs) -> Callable[[], Any]:
    def run() -> Any:
        with backend("reference"):
            return build(inputs)()

    return run


def _without_gradients(run: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return run()


def _allowance(rounded: Sequence[Tensor], true: Tensor, dtype: torch.dtype) -> float:
    """Return the allowed deviation.

    It is twice what plain PyTorch and the definition lose in this dtype, and two roundings of the largest value.
    """
    lost = max(float((low.to(true.dtype) - true).abs().max()) for low in rounded)
    return 2 * lost + 2 * torch.finfo(dtype).eps * float(true.abs().max()) + torch.finfo(torch.float32).tiny


def _as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _bytes(inputs: Inputs) -> int:
    return sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
