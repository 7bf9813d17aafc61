"""One training run at a time in a folder, by a lock that the operating system releases when the process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ..files import remove_leftovers
from . import parallel

_LOCK = ".lock"
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}

_own = threading.local()
_descriptors: set[int] = set()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a folder for this run, creating it if needed. Blocks of one thread may be nested. Every process must call it.

    Half-written files of a killed run are removed. Raises OSError if another run holds the lock.
    """
    folder = folder.resolve()
    mine: set[Path] = _own.__dict__.setdefault("folders", set())
    if folder in mine:
        yield
        return
    lock, problem, new = None, None, not folder.exists()
    if parallel.rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
            remove_leftovers(folder)
        except OSError as error:
            problem = error
    try:
        if problem := parallel.of_the_first(problem):
            raise problem
        mine.add(folder)
        yield
    finally:
        mine.discard(folder)
        if lock is not None:
            (folder / _LOCK).unlink(missing_ok=True)
            _descriptors.discard(lock)
            os.close(lock)
            if new:
                with suppress(OSError):  # not if anything was written
                    folder.rmdir()


def _lock(folder: Path) -> int | None:
    _close_in_forked_processes()
    while True:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _UNSUPPORTED:
                warnings.warn(f"{folder}: no locks on this file system; let no other run write here", stacklevel=3)
                return None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise OSError(f"{folder}: another run is writing to this folder; let it end, or use another one") from error
        if os.fstat(descriptor).st_nlink:  # otherwise a run that has ended since removed this file
            _descriptors.add(descriptor)
            return descriptor
        os.close(descriptor)


@cache
def _close_in_forked_processes() -> None:
    """Close the lock file in forked worker processes, which outlive a killed run by seconds and would keep the lock."""
    os.register_at_fork(after_in_child=_close)


def _close() -> None:
    _own.__dict__.clear()
    while _descriptors:
        os.close(_descriptors.pop())
