"""Resource usage of the CUDA extension's kernels, read from the machine code in the built library. No GPU is needed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from pg_kernels.benchmarks.kernels.resources import DEVICES, Kernel

TARGETS = {"sm_80": "sm_80", "sm_90": "sm_90a"}
"""The targets that the extension has machine code for, with the compiler's name of each."""
_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
_KERNELS = "few_rows|many_rows|many_rows_sm90|quantize_rows|dequantize_rows|dequantize|reduce_split_k"
_INSTRUCTIONS = {"HGMMA": "wgmma", "IGMMA": "wgmma", "HMMA": "mma", "IMMA": "mma"}
_COPIES = {"UTMALDG": "TMA", "LDGSTS": "cp.async"}


def sources_id() -> str:
    """Return a hash of the extension's sources."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.rglob("*")):
        if path.suffix in (".cu", ".h", ".cpp"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def installed_library() -> Path:
    """Return the path of pg_kernels._cuda. Raises RuntimeError if it is not built."""
    found = find_spec("pg_kernels._cuda")
    if found is None or found.origin is None:
        raise RuntimeError("pg_kernels._cuda is not built: install with PG_KERNELS_CUDA=1, which needs nvcc")
    return Path(found.origin)


def build_library(folder: Path) -> Path:
    """Build the extension from the sources of a clone into `folder`. Raises RuntimeError if the build fails."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    command += ["--build-temp", str(folder / "objects")]
    environment = {**os.environ, "PG_KERNELS_CUDA": "1"}
    done = subprocess.run(command, cwd=_SOURCES.parents[1], env=environment, capture_output=True, text=True)
    built = list(folder.rglob("_cuda*.so"))
    if not built:
        raise RuntimeError(f"the CUDA extension cannot be built: {(done.stderr or done.stdout).strip()[-500:]}")
    return built[0]


def extension_kernels(target: str, library: Path) -> Iterator[Kernel]:
    """Yield the kernels of a built CUDA extension for a target. A target without machine code in the library has none.

    `spills` are bytes of local memory per thread. `shared` is the static shared memory; launches add dynamic shared memory.
    Raises RuntimeError if Triton, which brings the disassembler, is not installed.
    """
    if find_spec("triton") is None:
        raise RuntimeError("triton is not installed")
    if target not in TARGETS:
        return
    architecture = TARGETS[target]
    usage = _disassemble(library, "--dump-resource-usage", "-arch", architecture)
    instructions = _instructions(_disassemble(library, "-sass", "-arch", architecture))
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for symbol, registers, stack, shared, local in re.findall(pattern, usage):
        name, launch = _read(symbol)
        if name.endswith("sm90") and target != "sm_90":  # only sm_90 has code in it
            continue
        names = instructions[symbol]
        yield Kernel(
            id=sources_id(),
            op="int8_linear",
            name=f"{name} (C++)",
            launch=launch,
            target=target,
            registers=int(registers),
            spills=int(stack) + int(local),
            shared=int(shared),
            shared_limit=DEVICES[target].shared_memory,
            products=next((_INSTRUCTIONS[i] for i in _INSTRUCTIONS if i in names), ""),
            loads=next((_COPIES[i] for i in _COPIES if i in names), ""),
        )


def _disassemble(library: Path, *options: str) -> str:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, *options, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _instructions(sass: str) -> dict[str, set[str]]:
    """Return the names of the instructions in each function."""
    names: dict[str, set[str]] = defaultdict(set)
    for function in sass.split("Function : ")[1:]:
        symbol, _, body = function.partition("\n")
        names[symbol.strip()] = set(
            re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", body, re.MULTILINE)
        )
    return names


def _read(symbol: str) -> tuple[str, str]:
    """Return a kernel's name and its template arguments from the mangled `symbol`."""
    found = re.search(rf"\d({_KERNELS})_kernel(\S*)", symbol)
    assert found is not None, symbol
    arguments = re.findall(r"\d(BFloat16|Float16|Int8)E|Li(\d+)E|Lb([01])E|^I([fi])Lb", found[2])
    return found[1], ", ".join("".join(argument) for argument in arguments)
