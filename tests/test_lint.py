"""`make lint` sees the types of the whole package, although setup.py maps two of its packages to other folders."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each line's comment is the error that mypy must find.
WRONG_CALLS = """
from torch import Tensor
from pg_kernels import quantize_, rms_norm
from pg_kernels.model import PaliGemma, Processor

def wrong(model: PaliGemma, processor: Processor, x: Tensor) -> None:
    model.generate_text(x)  # [attr-defined]
    PaliGemma.from_pretrained("folder", bits=8)  # [call-arg]
    processor.decode(x, length="all")  # [call-arg]
    quantize_(model).bits  # [attr-defined]
    rms_norm(x, x, residual=x).shape  # [attr-defined]
"""


def test_a_wrong_call_fails(tmp_path: Path) -> None:
    """Run mypy as if a benchmarks file and a tests file ended with wrong calls."""
    subprocess.run(["make", "-s", "types"], cwd=ROOT, check=True)
    expected, arguments = set(), []
    for file in ("build/types/pg_kernels/benchmarks/__main__.py", "tests/test_lint.py"):
        text = (ROOT / file).read_text(encoding="utf-8")
        shadow = tmp_path / file.replace("/", "_")
        shadow.write_text(text + WRONG_CALLS, encoding="utf-8")
        arguments += ["--shadow-file", file, str(shadow)]
        for number, line in enumerate(WRONG_CALLS.splitlines(), len(text.splitlines()) + 1):
            if "  # [" in line:
                expected.add((file, number, line.partition("  # ")[2]))
    result = subprocess.run([sys.executable, "-m", "mypy", *arguments], cwd=ROOT, capture_output=True, text=True)
    errors = re.findall(r"^(\S+?):(\d+): error: .*  (\[[a-z-]+\])$", result.stdout, flags=re.MULTILINE)
    assert {(file, int(line), code) for file, line, code in errors} == expected, result.stdout + result.stderr
