"""Signals that end a training run between two steps, after a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# `timeout` and other parents send a signal to the process and to its group. Signals this close together count as one.
_SAME_REQUEST_SECONDS = 0.2


class Interrupted(KeyboardInterrupt):
    """A signal stopped a training run, after a checkpoint; `signum` is its number."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(f"{signal.Signals(signum).name}{message}")
        self.signum = signum


class Signals:
    """A context that records a first signal of `SIGNALS`. A second one has its previous effect.

    Signals that the process ignores stay ignored. Python runs handlers in the main thread only; in another thread the context
    changes nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        """The number of the first signal, or 0."""
        self._when = 0.0
        self._at_once = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                previous = signal.getsignal(signum)
                if previous not in (None, signal.SIG_IGN):
                    self._previous[signum] = previous
                    signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `Interrupted` inside the block when a signal arrives, or at its start if one has arrived already."""
        self._at_once = True
        try:
            if self.received:
                raise Interrupted(self.received)
            yield
        finally:
            self._at_once = False

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._when > _SAME_REQUEST_SECONDS:
                self.__exit__()
                os.kill(os.getpid(), signum)
            return
        self.received, self._when = signum, time.monotonic()
        if self._at_once:
            raise Interrupted(signum)
        with suppress(OSError):  # print would fail if the signal came while another print was writing
            os.write(
                2, f"\n{signal.Signals(signum).name}: stopping after this step; a second one stops at once\n".encode()
            )


def leave_signals_to_the_trainer(_worker: int) -> None:
    """Let a worker that reads data ignore signals, which terminals, torchrun and batch systems send to all processes.

    SIGTERM ends the worker a minute later, because its parent also sends SIGTERM to a worker that does not exit.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
