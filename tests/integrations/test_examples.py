"""Every file of examples/ runs unchanged and does what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "finetune_digits.py": ["--train", "16", "--test", "4", "--steps", "3", "--batch", "4"]
}  # too few steps to learn
SAYS = {
    "finetune_digits.py": "one that was not: the same",
    "lora_int8.py": "after: loss 0.",
    "robot_policy.py": "patched, int8-dynamic",
    "transformers_finetune.py": "after: eine banane und eine eule",
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example(path: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, path, *ARGUMENTS.get(path.name, [])], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert SAYS[path.name] in run.stdout
