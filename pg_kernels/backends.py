"""Which implementation of an op runs: `backend()` asks for one, `select()` decides, `explain()` says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch

BACKENDS = ("triton", "native", "reference")
"""In the order in which "auto" prefers them."""

_requested: ContextVar[str] = ContextVar("pg_kernels.backend")
_traced: str | None = None
"""What a `backend()` block inside a function asks for while torch.compile traces that function; None at all other times."""


class _Context:
    """`requested` is what this context's innermost block asks for, or this object outside all blocks.

    torch.compile cannot trace ContextVar.get, but it reads and guards a property whose getter is C code like a plain attribute.
    """

    requested = property(_requested.get)  # called with this object, which get takes as the default


_context = _Context()
_registered: dict[str, dict[str, Callable[[str], str | None]]] = {}


def register_backend(op: str, backend: str, unavailable_reason: Callable[[str], str | None]) -> None:
    """Declare that `op` has an implementation on `backend`.

    `unavailable_reason(device_type)` gives the reason why it cannot run on "cpu" or "cuda" tensors here, or None when it can.
    """
    _registered.setdefault(op, {"reference": lambda device_type: None})[backend] = unavailable_reason


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the `with` block on one backend: "auto", "triton", "native" or "reference".

    "auto", the default, takes the first of the others that can run the op on the tensors' device. A named backend is
    strict: an op that does not have it raises RuntimeError with the reason. The setting is a context variable: other threads and
    asyncio tasks do not see it. A backward pass uses what its forward used. Raises ValueError for any other name.
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
    """Return what the innermost `backend()` block of this thread or asyncio task asks for, or "auto"."""
    if _traced is not None:
        return _traced
    name = _context.requested
    return "auto" if name is _context else name


def select(
    op: str, device_type: str, unsupported: Mapping[str, str | None] | None = None, avoid: tuple[str, ...] = ()
) -> str:
    """Give the backend that `op` runs on for tensors of a device type; RuntimeError when the one asked for cannot.

    `unsupported` are reasons in this call's arguments why a backend cannot take it, by backend; those in `avoid` can, but "auto"
    passes over them because another is faster.
    """
    unsupported, asked = unsupported or {}, requested()
    if asked == "auto":
        return next(
            name
            for name in BACKENDS
            if name not in avoid and _passed_over(op, name, device_type) is None and unsupported.get(name) is None
        )
    reason = _unavailable_reason(op, asked, device_type) or unsupported.get(asked)
    if reason is not None:
        raise RuntimeError(f"{op} cannot run on backend {asked!r} with {device_type} tensors: {reason}")
    return asked


def available(op: str, device_type: str, *, interpreted: bool = False) -> list[str]:
    """The backends that can run `op` on tensors of a device type here, in the order in which "auto" prefers them.

    `interpreted` includes Triton's interpreter where it is switched on, for which speed says nothing.
    """
    unavailable_reason = _unavailable_reason if interpreted else _passed_over
    return [name for name in BACKENDS if unavailable_reason(op, name, device_type) is None]


def explain(device_type: str) -> dict[str, tuple[str, dict[str, str]]]:
    """For every op: the backend that "auto" takes on a device type, and why each preferred one is not taken."""
    table = {}
    for op in sorted(_registered):
        reasons: dict[str, str] = {}
        for name in BACKENDS:
            reason = _passed_over(op, name, device_type)
            if reason is None:
                table[op] = (name, reasons)
                break
            reasons[name] = reason
    return table


def _passed_over(op: str, backend: str, device_type: str) -> str | None:
    """Why "auto" does not take a backend, or None when it does."""
    reason = _unavailable_reason(op, backend, device_type)
    if reason is None and (backend, device_type) == ("triton", "cpu"):
        return "on the CPU it is Triton's interpreter, which must be asked for"
    return reason


def _unavailable_reason(op: str, backend: str, device_type: str) -> str | None:
    unavailable_reason = _registered[op].get(backend)
    return f"no {backend} implementation" if unavailable_reason is None else unavailable_reason(device_type)
