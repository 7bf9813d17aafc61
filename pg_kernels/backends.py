"""Which implementation of an op runs: `backend()` requests one, `select()` decides, `explain()` gives the reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch

BACKENDS = ("triton", "native", "reference")
"""All backends, in the order in which "auto" prefers them."""

_requested: ContextVar[str] = ContextVar("pg_kernels.backend")
_traced: str | None = None
"""The backend of the innermost `backend()` block in the code that torch.compile is tracing; None outside of such blocks."""


class _Context:
    """`requested` is the backend of this context's innermost `backend()` block, or this object itself outside all blocks.

    torch.compile cannot trace ContextVar.get. It reads and guards a property whose getter is C code like a plain attribute.
    """

    requested = property(_requested.get)  # the property passes this object to get, as the default


_context = _Context()
_registered: dict[str, dict[str, Callable[[str], str | None]]] = {}


def register_backend(op: str, backend: str, unavailable_reason: Callable[[str], str | None]) -> None:
    """Declare that `op` has an implementation on `backend`.

    `unavailable_reason(device_type)` returns why it cannot run on "cpu" or "cuda" tensors on this machine, or None if it can.
    """
    _registered.setdefault(op, {"reference": lambda device_type: None})[backend] = unavailable_reason


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the `with` block on one backend: "auto", "triton", "native" or "reference".

    "auto", the default, takes the first of "triton", "native" and "reference" that can run the op on the tensors' device. A named
    backend is strict: an op that it cannot run raises RuntimeError with the reason. The setting is a context variable: other
    threads and asyncio tasks do not see it. A backward pass runs on the backend of its forward pass.

    Raises ValueError for any other name.
    """
    global _traced
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of 'auto', {', '.join(map(repr, BACKENDS))}")
    if torch.compiler.is_dynamo_compiling():
        previous, _traced = _traced, name
        try:
            yield
        finally:
            _traced = previous
    else:
        token = _requested.set(name)
        try:
            yield
        finally:
            _requested.reset(token)


def requested() -> str:
    """Return the backend of the innermost `backend()` block of this thread or asyncio task, or "auto"."""
    if _traced is not None:
        return _traced
    name = _context.requested
    return "auto" if name is _context else name


def select(
    op: str, device_type: str, unsupported: Mapping[str, str | None] | None = None, avoid: tuple[str, ...] = ()
) -> str:
    """Return the backend that `op` runs on for tensors of a device type.

    `unsupported` says by backend why it does not support this call's arguments. "auto" also skips the backends in `avoid`, which
    support them, but are slower than another one.

    Raises RuntimeError if a named backend was requested that cannot run the call.
    """
    unsupported, name = unsupported or {}, requested()
    if name == "auto":
        return next(
            candidate
            for candidate in BACKENDS
            if candidate not in avoid
            and _skipped_reason(op, candidate, device_type) is None
            and unsupported.get(candidate) is None
        )
    reason = _unavailable_reason(op, name, device_type) or unsupported.get(name)
    if reason is not None:
        raise RuntimeError(f"{op} cannot run on backend {name!r} with {device_type} tensors: {reason}")
    return name


def available(op: str, device_type: str, *, interpreted: bool = False) -> list[str]:
    """Return the backends that can run `op` on tensors of a device type on this machine, in the order of BACKENDS.

    `interpreted` includes Triton's interpreter if it is switched on.
    """
    unavailable_reason = _unavailable_reason if interpreted else _skipped_reason
    return [name for name in BACKENDS if unavailable_reason(op, name, device_type) is None]


def explain(device_type: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Return for every op the backend that "auto" takes on a device type, and why it skips each backend before that one."""
    table = {}
    for op in sorted(_registered):
        reasons: dict[str, str] = {}
        for name in BACKENDS:
            reason = _skipped_reason(op, name, device_type)
            if reason is None:
                table[op] = (name, reasons)
                break
            reasons[name] = reason
    return table


def _skipped_reason(op: str, backend: str, device_type: str) -> str | None:
    """Return why "auto" skips a backend, or None if it does not."""
    reason = _unavailable_reason(op, backend, device_type)
    if reason is None and (backend, device_type) == ("triton", "cpu"):
        return "on the CPU it is Triton's interpreter, which must be asked for"
    return reason


def _unavailable_reason(op: str, backend: str, device_type: str) -> str | None:
    unavailable_reason = _registered[op].get(backend)
    return f"no {backend} implementation" if unavailable_reason is None else unavailable_reason(device_type)
