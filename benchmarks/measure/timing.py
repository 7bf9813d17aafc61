"""Timing that can be compared: contenders take turns, and find neither inputs nor weights in a cache."""

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
    """One contender on one set of inputs: what to time, and everything it computes, to be judged."""

    task: TimedCall
    results: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Effort:
    """How long to measure one case: rounds until `budget_s` is used up, but within these bounds."""

    budget_s: float
    min_rounds: int
    max_rounds: int


@dataclass
class Samples:
    """Seconds of each round: on the device, and until the call returned to the host."""

    device_s: list[float] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time one call on the wall clock, until the device has done it."""
    _synchronize(device)
    start = perf_counter()
    call()
    _synchronize(device)
    return perf_counter() - start


def interleave(
    contenders: Mapping[str, Sequence[TimedCall]], device: torch.device, effort: Effort, *, wall: bool = False
) -> dict[str, Samples]:
    """Time each contender once a round, in a random order, the same in every run. All of them have run before.

    Drift of the machine meets all of them alike, so ratios within a round hold where times do not; and who leaves the caches
    of code and pages empty, as a call that streams hundreds of megabytes does, is not always before the same one. Every
    contender has several tasks on different memory: each call takes the next one, so that together they outgrow the cache; on a
    GPU the cache is also overwritten before every call, and the device is kept busy until the host has queued the call, so that
    launches do not count. With `wall` the clock on the wall is used instead, for whole models, where waiting for the host is
    part of it.
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

    # A collection in the middle of one contender's call would be its loss alone.
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        if not wall:  # a whole model's call touches all its memory by itself
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
        # Kept until the clock is read: giving back the result's memory is not the op's work.
        result = task.run(state)
        host_s = perf_counter() - start
        _synchronize(self.device)
        elapsed = perf_counter() - start
        del result
        return elapsed, host_s


class _EventClock:
    """Device time between two CUDA events."""

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
        torch.cuda._sleep(int(self.hold_s * 2e9))  # in cycles, of which no GPU has more than this in a second
        start.record()
        before = perf_counter()
        result = task.run(state)
        host_s = perf_counter() - before
        end.record()
        torch.cuda.synchronize(self.device)
        del result
        # The next call is held back for as long as the slowest so far took to queue, and some more.
        self.hold_s = min(max(self.hold_s, 1.5 * host_s), 5e-3)
        return start.elapsed_time(end) / 1e3, host_s


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most memory that torch held at once during a call, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes to stderr at every start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
