"""Training with transformers, patched and plain: measuring and storing it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pg_kernels.benchmarks.__main__ import main
from pg_kernels.benchmarks.sessions import drop_in
from pg_kernels.benchmarks.sessions.drop_in import LORA, PATCHED, PLAIN, STEP


def test_both_tasks_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drop_in, "STEPS", {LORA: 2, STEP: 2})
    monkeypatch.setattr(drop_in, "VOCABULARY", 20_000)
    load, loads = drop_in.Processor.from_pretrained, []
    monkeypatch.setattr(drop_in.Processor, "from_pretrained", lambda path: loads.append(path) or load(path))
    folder = tmp_path / "run"
    assert main(["drop-in", str(folder), "--rounds", "1"]) == 0
    assert len(loads) == 4, "a run of two batches loads one processor; both contenders have two"
    content = json.loads((folder / "drop-in.json").read_text())
    for task in (LORA, STEP):
        (plain,), (patched,) = (content["seen"][task][name] for name in (PLAIN, PATCHED))
        assert plain["seconds"] > 0 and len(plain["losses"]) == len(patched["losses"]) == 2
        assert patched["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    # The patched model holds neither logits nor their gradients.
    peaks = content["peaks"][STEP]
    assert peaks[PLAIN] - peaks[PATCHED] > content["logits_bytes"] == 4 * 2 * (256 + 32) * 20_000
    assert (folder / "drop-in.md").read_text() == drop_in.markdown(content) + "\n"
    assert (folder / "drop-in.png").read_bytes().startswith(b"\x89PNG")


def test_tables_of_what_was_stored() -> None:
    def seen(seconds: float, losses: list[float]) -> dict[str, object]:
        return {"seconds": seconds, "losses": losses}

    content = {
        "device": "here",
        "versions": {"torch": "2"},
        "command": "this",
        "logits_bytes": 5e8,
        "peaks": {STEP: {PLAIN: 3e9, PATCHED: 1e9}},
        "seen": {
            STEP: {
                PLAIN: [seen(4.0, [2.0, 1.0]), seen(6.0, [2.0, 1.0]), seen(5.0, [2.0, 1.0])],
                PATCHED: [seen(2.0, [2.0, 1.01]), seen(3.0, [2.0, 1.0]), seen(2.5, [2.0, 1.0])],
            }
        },
    }
    text = drop_in.markdown(content)
    assert f"| {STEP} | {PLAIN} | 5.00 s |  | 3,000 MB |  |  |" in text
    assert f"| {STEP} | {PATCHED} | 2.50 s | 2.00× | 1,000 MB | 2,000 MB | 1.0e-02 |" in text
    assert "medians of 3 rounds in random order, of 2 steps." in text and "500 MB in fp32" in text


def test_rounds_must_be_positive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drop-in", str(tmp_path / "run"), "--rounds", "0"]) == 1
    assert "--rounds: expected at least 1, got 0" in capsys.readouterr().err and not (tmp_path / "run").exists()
