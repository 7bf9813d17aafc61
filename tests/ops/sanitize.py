"""Build the C++ extension with AddressSanitizer and UndefinedBehaviorSanitizer, and run its tests on that build.

Usage: python tests/ops/sanitize.py. The exit status is 77 if the compiler has no sanitizers, else pytest's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = "-fsanitize=address,undefined"
TESTS = [
    "test_int8.py",
    "test_int8_extension.py",
    "test_int8_fused.py",
    "test_geglu.py",
    "test_rms_norm.py",
    "test_apply_rotary.py",
    "test_prefix_lm_attention.py",
]
# Leave out compiled graphs: they check no more memory accesses, and take long.
SELECTION = "(native or instruction_sets_a) and not compiles and not inductor and not opcheck"


def main() -> int:
    if sys.platform != "linux" or not _compiles():
        print(
            "sanitize: needs Linux and a compiler with AddressSanitizer and UndefinedBehaviorSanitizer", file=sys.stderr
        )
        return 77
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "pg_kernels")
        shutil.copytree(ROOT / "pg_kernels", package, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
        _build(Path(folder))
        # Preload the sanitizers' libraries: Python itself was not built with them.
        environment = {
            **os.environ,
            "LD_PRELOAD": " ".join(_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch never free some of their memory
        }
        # Run in `folder`: Python finds modules in the current folder before those of an editable install.
        Path(folder, "built_here.py").write_text(
            f"import pg_kernels._C\nassert pg_kernels._C.__file__.startswith({folder!r}), pg_kernels._C.__file__\n"
        )
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--capture=sys",
            "-c",
            str(ROOT / "pyproject.toml"),
            "--rootdir",
            str(ROOT),
        ]
        for plugin in ("built_here", "no:benchmark", "no:cacheprovider", "no:xdist"):
            command += ["-p", plugin]
        command += ["-k", SELECTION, *(str(Path(__file__).parent / name) for name in TESTS)]
        return subprocess.run(command, cwd=folder, env=environment).returncode


def _compiles() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("int main() {}\n")
        command = [_compiler(), *FLAGS.split(), str(source), "-o", str(Path(folder, "empty"))]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            return False


def _build(folder: Path) -> None:
    # -O1: with more optimisation the sanitized code takes three times as long to compile.
    flags = f"{FLAGS} -O1 -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    # Set both: which of CFLAGS and CXXFLAGS setuptools uses for C++ depends on its version.
    environment = {**os.environ, "CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": flags, "PG_KERNELS_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(folder / "build")]
    subprocess.run([*command, "--build-lib", str(folder)], cwd=ROOT, env=environment, check=True)
    (extension,) = (folder / "pg_kernels").glob("_C*.so")
    binary = extension.read_bytes()
    for check in (b"__asan_report", b"__ubsan_handle"):
        if check not in binary:
            raise RuntimeError(f"{extension.name} never calls {check.decode()}: it was built without sanitizers")


def _library(name: str) -> str:
    found = subprocess.run([_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


if __name__ == "__main__":
    sys.exit(main())
