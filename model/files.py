"""Atomic writes, and reading errors that name the file."""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Yield an unused path beside `path` with the same suffix. What is left there at the end is removed.

    The folder of `path` is created if needed. Write errors inside the block, safetensors' included, become OSErrors that name
    `path`.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    except SafetensorError as error:  # only its text contains the operating system's error
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, f"cannot write {path}: {os.strerror(number) if code else error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary.exists():
            os.unlink(temporary)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary siblings that killed processes left of a folder and its files. No one may be writing them."""
    for where, name in ((folder.parent, re.escape(folder.name)), (folder, ".+")):
        with suppress(PermissionError):
            for path in list(where.iterdir()):
                if not re.fullmatch(rf"\.[0-9a-f]{{8}}\.{name}", path.name):
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old or the new content. Raises OSError naming the file."""
    with temporary_sibling(path) as temporary:
        temporary.write_bytes(content)
        os.replace(temporary, path)


def json_bytes(content: object) -> bytes:
    """Serialise to the indented UTF-8 JSON that checkpoint folders hold."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError for anything else, and for lists or objects that are nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError naming the file if it holds anything else."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise unreadable(path, "a JSON object", error) from error
    if not isinstance(content, dict):
        raise unreadable(path, "a JSON object", f"it holds a {type(content).__name__}")
    return content


def unreadable(path: Path, kind: str, reason: object) -> ValueError:
    """Return the error for a file of another kind than expected. It recognises a Git LFS pointer, the usual cause."""
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            reason = "it is a Git LFS pointer; fetch the real file with `git lfs pull`"
    return ValueError(f"{path} cannot be read as {kind}: {str(reason)[:300]}")


def shown(value: object) -> str:
    """Return a file's value as error messages show it: in JSON's spelling, and shortened if it is long or deep."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else reprlib.repr(value)
