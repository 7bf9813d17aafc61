"""Comparable timing: contenders take turns, and neither inputs nor weights are in a cache."""

from __future__ import annotations

import gc
import itertools
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TimedCall:
    """What is timed: `run`, given what the untimed `prepare` returned."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Candidate:
    """One contender on one set of inputs: the call to time, and all its results for judging."""

    task: TimedCall
    results: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Effort:
    """How long to measure one case: rounds until `budget_s` seconds are used, within the bounds."""

    budget_s: float
    min_rounds: int
    max_rounds: int


@dataclass
class Samples:
    """The seconds of each round: on the device, and until the call returned to the host."""

    device_s: list[float] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the wall-clock time of one call until the device has finished."""
    _synchronize(device)
    start = perf_counter()
    call()
    _synchronize(device)
    return perf_counter() - start


def interleave(
    contenders: Mapping[str, Sequence[TimedCall]], device: torch.device, effort: Effort, *, wall: bool = False
) -> dict[str, Samples]:
    """Time each contender once in every round, in a random order that is the same in every run. All contenders have run before.

    A drift of the machine affects all contenders alike, so that ratios within a round hold although times do not. The random
    order
    also mixes the predecessors: a call that streams hundreds of megabytes leaves empty caches to its successor. Every contender
    has several tasks on different memory, taken in turn, which together outgrow the cache. On a GPU the cache is also
    overwritten before every call, and the device is kept busy until the host has queued the call, so that launches do not
    count. With `wall` the wall clock is used instead, for whole models, whose time includes waiting for the host.
    """
    clock = _WallClock(device) if wall or device.type != "cuda" else _EventClock(device)
    samples = {name: Samples() for name in contenders}
    turns = {name: itertools.cycle(tasks) for name, tasks in contenders.items()}
    names, draw = list(contenders), random.Random(0)

    def one_round(order: Sequence[str], keep: bool) -> None:
        for name in order:
            device_s, host_s = clock.time(next(turns[name]))
            if keep:
                samples[name].device_s.append(device_s)
                samples[name].host_s.append(host_s)

    # A garbage collection during a call would only slow down that contender.
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        if not wall:  # a whole model's call reads more memory than the cache holds
            one_round(names, keep=False)
        start = perf_counter()
        for done in range(effort.max_rounds):
            one_round(draw.sample(names, len(names)), keep=True)
            if done + 1 >= effort.min_rounds and perf_counter() - start > effort.budget_s:
                break
    finally:
        if collecting:
            gc.enable()
    return samples


class _WallClock:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, task: TimedCall) -> tuple[float, float]:
        state = task.prepare()
        _synchronize(self.device)
        start = perf_counter()
        # Keep the result until the clock is read: freeing its memory is not part of the op.
        result = task.run(state)
        host_s = perf_counter() - start
        _synchronize(self.device)
        elapsed = perf_counter() - start
        del result
        return elapsed, host_s


class _EventClock:
    """Measures device time between two CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = torch.empty(
            2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device
        )
        self.hold_s = 1e-4

    def time(self, task: TimedCall) -> tuple[float, float]:
        state = task.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        torch.cuda._sleep(int(self.hold_s * 2e9))  # in cycles; no GPU has more in a second
        start.record()
        before = perf_counter()
        result = task.run(state)
        host_s = perf_counter() - before
        end.record()
        torch.cuda.synchronize(self.device)
        del result
        # Delay the next call by a little more than the longest queueing time so far.
        self.hold_s = min(max(self.hold_s, 1.5 * host_s), 5e-3)
        return start.elapsed_time(end) / 1e3, host_s


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the most memory that torch allocated at once during a call, beyond its memory before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to stderr at every start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
