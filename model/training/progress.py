"""The progress of a training run on stderr: a bar on a terminal, lines in a file or a pipe."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from tqdm import tqdm

from . import parallel

_SECONDS = 10.0
"""Seconds between two lines."""


class Progress:
    """A context in which the first process shows a run's steps, from `first` to the last of `steps`.

    A closed terminal or pipe does not end the run.
    """

    def __init__(self, first: int, steps: int) -> None:
        self._first, self._steps = first, steps
        self._shown = parallel.rank() == 0
        self._lines = self._shown and not sys.stderr.isatty()
        self._loss: float | None = None
        self._started = time.monotonic()
        self._next_line = 0.0
        self._bar = tqdm(
            total=steps,
            initial=first,
            unit="step",
            mininterval=1,
            smoothing=0.05,
            disable=self._lines or not self._shown,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._bar.close()

    def update(self, step: int, loss: float, learning_rate: float) -> None:
        """Show a finished step. The bar shows a moving average of the loss, a line the step's own loss."""
        now = time.monotonic()
        if self._lines and (now >= self._next_line or step == self._steps):
            self._next_line = now + _SECONDS
            rate = (step - self._first) / max(now - self._started, 1e-9)
            left = tqdm.format_interval((self._steps - step) / rate)
            self.write(
                f"step {step}/{self._steps}: loss {loss:.4f}, learning rate {learning_rate:.2e}, {rate:.2f} steps/s, "
                f"{left} left"
            )
        self._loss = loss if self._loss is None else self._loss + 0.02 * (loss - self._loss)
        with suppress(OSError):
            self._bar.set_postfix(loss=f"{self._loss:.4f}", lr=f"{learning_rate:.2e}", refresh=False)
            self._bar.update()

    def write(self, text: str, *, every_process: bool = False) -> None:
        """Print a line, from the first process only or from every calling process."""
        with suppress(OSError):
            if self._lines or (every_process and not self._shown):
                print(text, file=sys.stderr, flush=True)
            elif self._shown:
                self._bar.write(text, file=sys.stderr)
