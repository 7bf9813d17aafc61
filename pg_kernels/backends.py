"""Which implementation of an op runs: `backend()` asks for one, `select()` decides, `explain()` says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

BACKENDS = ("triton", "native", "reference")
"""In the order in which "auto" prefers them."""

_requested = "auto"
_offers: dict[str, dict[str, Callable[[str], str | None]]] = {}


def offer(op: str, backend: str, obstacle: Callable[[str], str | None]) -> None:
    """Declare that `op` has an implementation on `backend`.

    `obstacle(device_type)` gives the reason why it cannot run on "cpu" or "cuda" tensors here, or None when it can.
    """
    _offers.setdefault(op, {"reference": lambda device_type: None})[backend] = obstacle


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the `with` block on one backend: "auto", "triton", "native" or "reference".

    "auto", the default, takes the first of the others that can run the op on the tensors' device. A named backend is
    strict: an op that does not have it raises RuntimeError with the reason. The setting is the process's, not the thread's, and a
    backward pass uses what its forward used. Raises ValueError for any other name.
    """
    global _requested
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of 'auto', {', '.join(map(repr, BACKENDS))}")
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def requested() -> str:
    """What the innermost `backend()` block asks for, or "auto"."""
    return _requested


def select(
    op: str, device_type: str, obstacles: Mapping[str, str | None] | None = None, avoid: tuple[str, ...] = ()
) -> str:
    """Give the backend that `op` runs on for tensors of a device type; RuntimeError when the one asked for cannot.

    `obstacles` are reasons in this call's arguments why a backend cannot take it, by backend; those in `avoid` can, but "auto"
    passes over them because another is faster.
    """
    obstacles = obstacles or {}
    if _requested == "auto":
        return next(
            name
            for name in BACKENDS
            if name not in avoid and _passed_over(op, name, device_type) is None and obstacles.get(name) is None
        )
    reason = _obstacle(op, _requested, device_type) or obstacles.get(_requested)
    if reason is not None:
        raise RuntimeError(f"{op} cannot run on backend {_requested!r} with {device_type} tensors: {reason}")
    return _requested


def available(op: str, device_type: str, *, interpreted: bool = False) -> list[str]:
    """The backends that can run `op` on tensors of a device type here, in the order in which "auto" prefers them.

    `interpreted` includes Triton's interpreter where it is switched on, for which speed says nothing.
    """
    obstacle = _obstacle if interpreted else _passed_over
    return [name for name in BACKENDS if obstacle(op, name, device_type) is None]


def explain(device_type: str) -> dict[str, tuple[str, dict[str, str]]]:
    """For every op: the backend that "auto" takes on a device type, and why each preferred one is not taken."""
    table = {}
    for op in sorted(_offers):
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
    reason = _obstacle(op, backend, device_type)
    if reason is None and (backend, device_type) == ("triton", "cpu"):
        return "on the CPU it is Triton's interpreter, which must be asked for"
    return reason


def _obstacle(op: str, backend: str, device_type: str) -> str | None:
    obstacle = _offers[op].get(backend)
    return f"no {backend} implementation" if obstacle is None else obstacle(device_type)
