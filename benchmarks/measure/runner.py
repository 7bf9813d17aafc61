"""Run cases: skip contenders that cannot run, mark those with wrong outputs, and time the others together."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import median

import torch

from pg_kernels.benchmarks.cases import models
from pg_kernels.benchmarks.cases.catalogue import WHOLE_MODEL_OPS, Case
from pg_kernels.benchmarks.contenders.ops import Contender
from pg_kernels.benchmarks.measure.machine import free_bytes
from pg_kernels.benchmarks.measure.model_trial import ModelTrial
from pg_kernels.benchmarks.measure.timing import Effort, Samples, interleave, peak_bytes
from pg_kernels.benchmarks.measure.trial import Candidate, OpTrial, Trial
from pg_kernels.benchmarks.report.results import Ceilings, Row


@dataclass(frozen=True)
class Plan:
    """How thoroughly a suite runs: `ops` and `models` say how long to measure, `longest_s` which cases are too slow."""

    ops: Effort
    models: Effort
    longest_s: float
    """A case whose roofline takes longer, in seconds, is skipped; a whole model may take ten times as long."""
    full: bool = True
    """Whether whole models include the contenders that take minutes to set up."""
    deadline_s: float | None = None
    """Cases that would start after this many seconds are skipped."""


QUICK = Plan(ops=Effort(0.4, 5, 40), models=Effort(0.5, 3, 10), longest_s=0.5, full=False)
FULL = Plan(ops=Effort(1.0, 10, 100), models=Effort(3.0, 3, 50), longest_s=2.0)


class Suite:
    """A run of the suite, which turns cases into rows."""

    def __init__(self, device: torch.device, plan: Plan, ceilings: Ceilings) -> None:
        self.device, self.plan, self.ceilings = device, plan, ceilings
        self.start = time.monotonic()

    def run(self, case: Case) -> list[Row]:
        """Check and time all contenders of a case. Errors become rows."""
        # Compilations for other shapes would make torch stop specialising for this shape.
        torch.compiler.reset()
        if case.op not in WHOLE_MODEL_OPS:
            models.release()
        trial = _trial(case, self.device, self.plan)
        rows = [_row(case, contender, *trial.work(contender)) for contender in trial.contenders()]
        reason = self._unavailable_reason(trial, rows[0])
        if reason is None:
            try:
                trial.draw()
            except torch.OutOfMemoryError as error:
                reason = _brief(error)
        if reason is not None:
            return [replace(row, status="skipped", reason=reason) for row in rows]
        rows_and_candidates = [
            self._check(trial, contender, row) for contender, row in zip(trial.contenders(), rows, strict=True)
        ]
        ready = {row.contender: [c.task for c in candidates] for row, candidates in rows_and_candidates if candidates}
        effort = self.plan.models if trial.wall else self.plan.ops
        samples = interleave(ready, self.device, effort, wall=trial.wall) if ready else {}
        return [
            self._timed(trial, contender, row, candidates[0], samples[row.contender]) if candidates else row
            for contender, (row, candidates) in zip(trial.contenders(), rows_and_candidates, strict=True)
        ]

    def _unavailable_reason(self, trial: Trial, row: Row) -> str | None:
        """Return why a case is not run, or None."""
        if self.plan.deadline_s is not None and time.monotonic() - self.start > self.plan.deadline_s:
            return f"the run's {self.plan.deadline_s:.0f} s were over"
        needed, free = trial.needed_bytes(), free_bytes(self.device)
        if needed > 0.9 * free:
            return f"needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
        longest = self.plan.longest_s * (10 if trial.wall else 1)
        bytes_, flops = trial.setup()
        for what, work in (("each call", row), ("what comes before it", replace(row, bytes=bytes_, flops=flops))):
            bound_s = self.ceilings.bound_s(work)
            if bound_s > longest:
                return f"{what} takes {bound_s:.1f} s or more on this machine, the limit is {longest:g} s"
        return None

    def _check(self, trial: Trial, contender: Contender, row: Row) -> tuple[Row, list[Candidate]]:
        """Build a contender and judge its output. Return no candidates if it fails or is wrong."""
        reason = contender.unavailable_reason(self.device.type)
        if reason is not None:
            return replace(row, status="skipped", reason=reason), []
        try:
            candidates = trial.build(contender)
        except ValueError as error:
            return replace(row, status="skipped", reason=_brief(error)), []
        except Exception as error:  # whatever another package raises is that contender's result
            return replace(row, status="failed", reason=_brief(error)), []
        try:
            error_ = trial.error(contender, candidates[0].results())
        except Exception as error:
            return replace(row, status="failed", reason=_brief(error)), []
        if error_ > 1:
            reason = f"its output is {error_:.3g} times as far off as allowed"
            return replace(row, status="wrong", reason=reason, error=error_), []
        return replace(row, error=error_), candidates

    def _timed(self, trial: Trial, contender: Contender, row: Row, candidate: Candidate, samples: Samples) -> Row:
        state = candidate.task.prepare()
        on_gpu = self.device.type == "cuda" and not trial.wall
        return replace(
            row,
            samples=tuple(samples.device_s),
            overhead_s=median(samples.host_s) if on_gpu else trial.overhead_s(contender),
            peak_bytes=peak_bytes(lambda: candidate.task.run(state), self.device),
        )


def contenders_of(case: Case, device: torch.device, plan: Plan) -> list[str]:
    """Return the names of all contenders of a case, including those that cannot run here."""
    return [contender.name for contender in _trial(case, device, plan).contenders()]


def _trial(case: Case, device: torch.device, plan: Plan) -> Trial:
    if case.op in WHOLE_MODEL_OPS:
        return ModelTrial(case, device, full=plan.full)
    return OpTrial(case, device)


def _row(case: Case, contender: Contender, bytes_: int, flops: int) -> Row:
    return Row(
        case=case.name,
        op=case.op,
        mode=case.mode,
        shape=case.shape,
        sizes=case.sizes,
        dtype=case.dtype,
        contender=contender.name,
        ours=contender.ours,
        baseline=contender.baseline,
        status="timed",
        bytes=bytes_,
        flops=flops,
        arithmetic="" if not flops else "int8" if contender.int8_activations else case.dtype,
    )


def _brief(error: Exception) -> str:
    """Return the first line of an error, shortened for a table."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 160 else f"{line[:157]}…"
