"""A little of the campaigns that `make fuzz` runs at length."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from kills import campaign  # noqa: E402


def test_runs_that_are_stopped_go_on_to_the_same_weights(tmp_path: Path) -> None:
    outcomes = campaign(tmp_path, {signal.SIGKILL: 1, signal.SIGTERM: 1}, seed=1, say=lambda _: None)
    assert outcomes.total() == 2
