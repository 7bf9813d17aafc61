"""The C++ extension built with sanitizers, and for another processor."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_sanitizers_find_nothing() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "sanitize.py")], capture_output=True, text=True, timeout=600
    )
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_neon_agrees_bit_for_bit(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), Path(__file__).parent / "instruction_sets.cpp"]
    program = tmp_path / "instruction_sets"
    flags = ["-O2", "-std=c++17", "-ffp-contract=off", "-march=armv8.2-a+dotprod", "-static", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program), "-ldl"], check=True, capture_output=True)
    done = subprocess.run([emulator, "-cpu", "max", str(program)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("neon: 60 products, 0 unlike scalar"), done.stdout
