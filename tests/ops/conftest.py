"""Tests that take `device` and `backend` run on every backend that their module's OP has on every device of this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pg_kernels
from pg_kernels.backends import available

# The tests in this folder import `helpers`, and pytest with --import-mode=importlib does not change sys.path.
sys.path.insert(0, str(Path(__file__).parent))

from helpers import DEVICES, DTYPES  # noqa: E402


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    names = ["device", "backend", "dtype"] if "dtype" in metafunc.fixturenames else ["device", "backend"]
    cases = []
    for device in DEVICES:
        marks = [pytest.mark.cuda] if device == "cuda" else []
        only = metafunc.definition.get_closest_marker("backends")
        for backend in available(metafunc.module.OP, device, interpreted=True):
            if only is not None and backend not in only.args:
                continue
            if "dtype" in names:
                cases += [
                    pytest.param(device, backend, dtype, marks=marks, id=_id(device, backend, dtype))
                    for dtype in DTYPES
                ]
            else:
                cases.append(pytest.param(device, backend, marks=marks, id=_id(device, backend)))
    metafunc.parametrize(names, cases, indirect=["backend"])


def _id(*values: object) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in values)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the whole test on one backend. The value is its name."""
    with pg_kernels.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _same_numbers_every_run() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
