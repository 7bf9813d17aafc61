"""Short versions of the campaigns that `make fuzz` runs, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGNS = [
    ["ops.py", "--count", "600"],
    ["files.py", "--count", "60"],
    ["kills.py", "--kill", "1", "--terminate", "1", "--interrupt", "0", "--seed", "1"],
]


@pytest.mark.skipif(sys.platform != "linux", reason="they fork, and look into /proc")
@pytest.mark.parametrize("campaign", CAMPAIGNS, ids=" ".join)
def test_campaign(campaign: list[str]) -> None:
    script, *options = campaign
    command = [sys.executable, str(Path(__file__).with_name(script)), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
