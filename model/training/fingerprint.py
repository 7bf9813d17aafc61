"""Fingerprints of the files that a training run depends on: cheap enough for every start, unchanged by moving or copying."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from ..files import parse_json

_BLOCK = 4096
_SAMPLES = 16


def of_files(paths: Iterable[Path]) -> str:
    """Fingerprint files by order, size and content: all of a small file, 16 blocks of 4 KiB of a larger one.

    A file that cannot be opened has a fingerprint, too.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                _update(digest, file, 0, os.fstat(file.fileno()).st_size)
        except OSError:
            digest.update(b"none")
    return digest.hexdigest()[:16]


def of_checkpoint(path: Path) -> str:
    """Fingerprint a Hugging Face folder or a big_vision .npz: all of its small files, and samples of every tensor.

    A path that is neither is fingerprinted by its name.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.iterdir()):
            if file.suffix in (".json", ".model", ".safetensors"):
                digest.update(file.name.encode())
                _update_from(digest, file)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # which has checksums
            digest.update(repr([(m.filename, m.file_size, m.CRC) for m in archive.infolist()]).encode())
    else:
        return str(path)
    return digest.hexdigest()[:16]


def _update_from(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            digest.update(file.read())
            return
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        digest.update(header)
        for name, tensor in parse_json(header).items():
            if name != "__metadata__":
                _update(digest, file, *(8 + length + offset for offset in tensor["data_offsets"]))


def _update(digest: Any, file: BinaryIO, start: int, end: int) -> None:
    """Hash the size of a part of a file, and all of its bytes or samples from its first to its last block."""
    size = end - start
    digest.update(size.to_bytes(8, "little"))
    if size <= _SAMPLES * _BLOCK:
        file.seek(start)
        digest.update(file.read(size))
        return
    for sample in range(_SAMPLES):
        file.seek(start + sample * (size - _BLOCK) // (_SAMPLES - 1))
        digest.update(file.read(_BLOCK))
