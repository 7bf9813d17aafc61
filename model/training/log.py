"""`log.jsonl` in a training run's folder: a line for every step and every evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import parse_json, write_atomically
from . import parallel
from .state import State

LOG = "log.jsonl"
_START = b'{"step": '


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log. A partial last line, which a killed run leaves, is ignored.

    Raises ValueError naming a damaged line, OSError if there is no file.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    if rest and not _START.startswith(rest[: len(_START)]):
        lines.append(rest)
    return [_entry(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _entry(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: damaged, it is not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: damaged, expected an object, got {type(entry).__name__}")
    expected = {"step": int, "kind": str, **({"loss": float} if entry.get("kind") == "train" else {})}
    for key, kind in expected.items():
        if type(entry.get(key)) is not kind:
            raise ValueError(f"{where}: damaged, expected {key!r} to be a {kind.__name__}, got {entry.get(key)!r}")
    return entry


class Log:
    """`log.jsonl` in a folder, and optionally TensorBoard's files.

    A continued run keeps the lines up to its checkpoint, because later steps are repeated.
    """

    def __init__(self, folder: Path, state: State, *, tensorboard: bool) -> None:
        self._file: Any = None
        self._board: Any = None
        if parallel.rank() > 0:
            return
        self._path = folder / LOG
        kept = []
        if state.resumed and self._path.is_file():
            last = {"train": state.step, "evaluation": state.evaluated}
            kept = [line for line in read_log(self._path) if line["step"] <= last.get(line["kind"], -1)]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = self._path.open("ab", buffering=0)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=state.step + 1)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in (self._file, self._board):
            if opened is not None:
                opened.close()

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Append a line {"step", "kind", …}."""
        if self._file is not None:
            line = json.dumps({"step": step, "kind": kind, **values}).encode() + b"\n"
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError as error:
                raise OSError(error.errno, f"cannot write {self._path}: {error.strerror}") from error
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
