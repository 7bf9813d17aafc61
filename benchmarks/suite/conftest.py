"""The suite's options, and the contents of a stored run beyond pytest-benchmark's JSON."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from pg_kernels.benchmarks.cases.catalogue import Case, select
from pg_kernels.benchmarks.measure.machine import ceilings, device_name, versions
from pg_kernels.benchmarks.measure.runner import FULL, QUICK, Plan, Suite, contenders_of
from pg_kernels.benchmarks.report.results import Row


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pg_kernels benchmarks")
    group.addoption("--full", action="store_true", help="all cases instead of the quick ones")
    group.addoption("--op", action="append", default=[], help="only the cases of this op; may be given several times")
    group.addoption(
        "--on", default="cuda" if torch.cuda.is_available() else "cpu", help="device (default: %(default)s)"
    )
    group.addoption("--deadline", type=float, metavar="S", help="skip the cases that come after so many seconds")


class SuiteRun:
    """The suite of one pytest session. All contenders of a case run at the first test of one of them."""

    def __init__(self, config: pytest.Config) -> None:
        self.device = torch.device(config.getoption("--on"))
        self.cases = {case.name: case for case in _selected(config)}
        self.suite = Suite(self.device, _plan(config), ceilings(self.device))
        self.rows: dict[str, dict[str, Row]] = {}

    def row(self, case: str, contender: str) -> Row:
        if case not in self.rows:
            self.rows[case] = {row.contender: row for row in self.suite.run(self.cases[case])}
        return self.rows[case][contender]

    def content(self) -> dict[str, Any]:
        """Return the content that `results.Run` reads."""
        rows = [row for table in self.rows.values() for row in table.values()]
        return {
            "device": device_name(self.device),
            "device_type": self.device.type,
            "versions": versions(),
            "command": shlex.join([*_allocator(), "pytest", *filter(_is_about_the_run, sys.argv[1:])]),
            "ceilings": asdict(self.suite.ceilings),
            "cases": list(self.rows),
            "not_timed": [row.extra_info() for row in rows if row.status != "timed"],
        }


def _allocator() -> list[str]:
    """Return the C library's memory limits that were set: a small op's time depends on them."""
    return [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]


def _is_about_the_run(argument: str) -> bool:
    """Return whether an argument concerns the run itself, not its storage or output."""
    return not argument.startswith(("--benchmark-json", "--benchmark-quiet", "--durations", "-r"))


_SUITE_RUN = pytest.StashKey[SuiteRun]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device, plan = torch.device(config.getoption("--on")), _plan(config)
    metafunc.parametrize(
        ("case", "contender"),
        [
            pytest.param(case.name, name, id=f"{case.name}/{name}", marks=_marks(case))
            for case in _selected(config)
            for name in contenders_of(case, device, plan)
        ],
    )


def _marks(case: Case) -> list[pytest.MarkDecorator]:
    return [getattr(pytest.mark, name) for name in ("quick", "sweep") if getattr(case, name)]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: the cases of `make bench`")
    config.addinivalue_line("markers", "sweep: cases that show how cost grows with one size")


def _plan(config: pytest.Config) -> Plan:
    return replace(FULL if config.getoption("--full") else QUICK, deadline_s=config.getoption("--deadline"))


def _selected(config: pytest.Config) -> list[Case]:
    return select(full=config.getoption("--full"), ops=tuple(config.getoption("--op")))


@pytest.fixture
def row(request: pytest.FixtureRequest, case: str, contender: str) -> Row:
    """Return one contender's result on a case."""
    stash = request.config.stash
    if _SUITE_RUN not in stash:
        stash[_SUITE_RUN] = SuiteRun(request.config)
    found = stash[_SUITE_RUN].row(case, contender)
    if found.status == "timed":
        # pytest-benchmark times each function alone, but contenders must take turns within a round. Its statistics accept times
        # only from a timer around a call, so the recorded times are replayed by a timer around an empty function.
        request.node.add_marker(pytest.mark.benchmark(timer=_Replay(found.samples), group=case))
    return found


class _Replay:
    """A timer that replays recorded times: the difference of each two readings is one of them."""

    def __init__(self, samples: tuple[float, ...]) -> None:
        self.readings = iter([reading for sample in samples for reading in (0.0, sample)])

    def __call__(self) -> float:
        return next(self.readings)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    del machine_info["node"]  # stored runs are published without host names


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["pg_kernels"] = config.stash[_SUITE_RUN].content()
