"""A committed record of every kernel compiled for every GPU. Only changed kernels need to be compiled again."""

from __future__ import annotations

import csv
import io
import tempfile
from dataclasses import asdict, fields
from operator import attrgetter
from pathlib import Path

import torch
from tqdm import tqdm

from pg_kernels.benchmarks.kernels.extension import TARGETS, build_library, extension_kernels, sources_id
from pg_kernels.benchmarks.kernels.resources import DEVICES, Kernel, compile_all
from pg_kernels.model.files import write_atomically

MANIFEST = Path(__file__).parents[1] / "kernels.csv"
# float16 uses bfloat16's tiles, and float32 uses the same tiles on every target.
MATRIX = [*((target, torch.bfloat16) for target in DEVICES), ("sm_90", torch.float32)]
_CPP = " (C++)"


def read(path: Path) -> list[Kernel]:
    """Read a manifest. A missing file is an empty manifest."""
    if not path.is_file():
        return []
    numbers = {field.name for field in fields(Kernel) if field.type == "int"}
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Kernel(**{name: int(text) if name in numbers else text for name, text in row.items()})  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        ]


def refresh(path: Path) -> list[Kernel]:
    """Compile the kernels that a manifest lacks, drop those that no launch chooses any more, write it, and return its kernels.

    Raises RuntimeError if Triton or, for changed C++ kernels, nvcc cannot compile, and OSError if the file cannot be written.
    """
    old = {kernel.id: kernel for kernel in read(path) if not kernel.name.endswith(_CPP)}
    kernels: dict[str, Kernel] = {}
    for target, dtype in tqdm(MATRIX, desc="kernels", disable=None):
        met: set[str] = set()
        new = {kernel.id: kernel for kernel in compile_all(target, [dtype], known=old.keys(), met=met)}
        kernels |= {id: (new | old)[id] for id in met}
    found = [*kernels.values(), *_extension(path)]
    order = attrgetter("op", "name", "target", "launch", "id")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(Kernel)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(kernel) for kernel in sorted(found, key=order))
    write_atomically(path, text.getvalue().encode())
    return found


def _extension(path: Path) -> list[Kernel]:
    kernels = [kernel for kernel in read(path) if kernel.name.endswith(_CPP)]
    if kernels and {kernel.id for kernel in kernels} == {sources_id()}:
        return kernels
    with tempfile.TemporaryDirectory() as folder:
        library = build_library(Path(folder))
        return [kernel for target in TARGETS for kernel in extension_kernels(target, library)]
