"""Tuning with made-up times: what is kept, what is dropped, and that launches use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import pg_kernels
from pg_kernels.benchmarks.kernels import tuning
from pg_kernels.benchmarks.kernels.tuning import OPS, Place, Site, sites, tune
from pg_kernels.benchmarks.measure.timing import Samples
from pg_kernels.model import cli
from pg_kernels.ops._common import devices
from pg_kernels.ops.rms_norm import tiles
from pg_kernels.ops.rms_norm.tiles import Tiles

pytest.importorskip("triton")
CPU = torch.device("cpu")
FASTER = Tiles(block_m=2, block_n=64, num_warps=4)
KEY = tiles.key("forward", 64, 2)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the interpreter's tuning file, in a folder of the test's own."""
    monkeypatch.setattr(devices, "TUNED_DIR", tmp_path)
    monkeypatch.setattr(tuning, "_unavailable_reason", lambda device: None)
    devices._tuned_file.cache_clear()
    yield devices.tuned_path(devices.INTERPRETER.name)
    devices._tuned_file.cache_clear()


@pytest.fixture
def one_site(monkeypatch: pytest.MonkeyPatch) -> list[Tiles]:
    """Restrict tuning to RMSNorm's forward kernel with rows of 64. The list receives the tiles of every launch."""
    launched = []
    weight = torch.ones(64, dtype=torch.bfloat16)

    def call() -> None:
        launched.append(tiles.choose_forward(64, 2, devices.INTERPRETER))
        pg_kernels.rms_norm(torch.ones(3, 64, dtype=torch.bfloat16), weight)

    site = Site("rms_norm", KEY, [tiles.choose_forward(64, 2, devices.INTERPRETER), FASTER], lambda: call)
    monkeypatch.setattr(tuning, "sites", lambda place: [site])
    return launched


def timer(times: Mapping[str, float]) -> Callable[..., dict[str, Samples]]:
    """Call every contender once, and give each the time that stands for it."""

    def interleave(contenders: Mapping[str, Any], *options: object) -> dict[str, Samples]:
        for (task,) in contenders.values():
            task.run(task.prepare())
        return {name: Samples([times.get(name, 1.0)], [0.0]) for name in contenders}

    return interleave


def test_winners_are_kept_and_used(stored: Path, one_site: list[Tiles], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = tiles.choose_forward(64, 2, devices.INTERPRETER)
    monkeypatch.setattr(tuning, "interleave", timer({str(FASTER): 0.9}))
    assert tune([], CPU, "the command") == stored
    assert set(one_site) == {usual, FASTER}
    content = json.loads(stored.read_text())
    assert content["tiles"] == {"rms_norm": {KEY: {"block_m": 2, "block_n": 64, "num_warps": 4}}}
    assert content["device"] == devices.INTERPRETER.name and content["command"] == "the command"
    assert content["versions"]["torch"]

    devices._tuned_file.cache_clear()  # as in a new process
    assert tiles.choose_forward(64, 2, devices.INTERPRETER) == FASTER
    assert tiles.choose_forward(64, 4, devices.INTERPRETER) != FASTER
    x, weight = torch.randn(5, 64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)
    with pg_kernels.backend("triton"):
        tuned = pg_kernels.rms_norm(x, weight)
    torch.testing.assert_close(tuned, pg_kernels.rms_norm(x, weight), rtol=1e-2, atol=0)

    # Tuning again compares with the default tiles. They win now, and nothing is kept.
    one_site.clear()
    monkeypatch.setattr(tuning, "interleave", timer({str(FASTER): 0.99}))
    tune(["rms_norm"], CPU, "again")
    assert set(one_site) == {usual, FASTER}
    assert json.loads(stored.read_text())["tiles"] == {"rms_norm": {}}


def test_other_ops_are_left_alone(stored: Path, one_site: list[Tiles], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {
        "geglu": {"all": {"block_n": 512, "num_warps": 4}},
        "rms_norm": {"other": {"block_m": 1, "block_n": 1, "num_warps": 4}},
    }
    stored.write_text(json.dumps({"tiles": before}))
    monkeypatch.setattr(tuning, "interleave", timer({str(FASTER): 0.5}))
    tune(["rms_norm"], CPU, "")
    found = json.loads(stored.read_text())["tiles"]
    assert found["geglu"] == before["geglu"] and found["rms_norm"].keys() == {"other", KEY}
    assert [path.name for path in stored.parent.iterdir()] == [stored.name]
    tune(["geglu"], CPU, "")
    assert json.loads(stored.read_text())["tiles"] == found


def test_an_interruption_keeps_what_was_found(
    stored: Path, one_site: list[Tiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    (site,) = tuning.sites(None)

    def interrupt() -> Callable[[], object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "sites", lambda place: [site, Site("geglu", "all", [], interrupt)])
    monkeypatch.setattr(tuning, "interleave", timer({str(FASTER): 0.5}))
    with pytest.raises(KeyboardInterrupt):
        tune([], CPU, "")
    assert KEY in json.loads(stored.read_text())["tiles"]["rms_norm"]


def test_every_site_launches_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate reaches the call of its own site."""
    asked: set[tuple[str, str]] = set()
    tuned = devices.tuned
    place = Place(CPU, devices.INTERPRETER, torch.bfloat16, small=True)

    def record(device: object, op: str, key: str) -> object:
        asked.add((op, key))
        return tuned(devices.INTERPRETER, op, key)

    # Tiles are chosen before a launch. The interpreter would take seconds for it.
    monkeypatch.setattr("triton.runtime.interpreter.InterpretedFunction.run", lambda self, *arguments, **options: None)
    for name in OPS:
        monkeypatch.setattr(f"pg_kernels.ops.{'rms_norm' if name == 'layer_norm' else name}.tiles.tuned", record)
    seen = set()
    for site in sites(place):
        if (site.op, site.key) in seen or any(text in site.key for text in ("2304", "3584", "4608", "512 tokens")):
            continue
        seen.add((site.op, site.key))
        call = site.prepare()
        asked.clear()
        with pg_kernels.backend("triton"), tuning.choosing(site, site.candidates[-1]):
            call()
        assert (site.op, site.key) in asked
    assert {op for op, _ in seen} == set(OPS)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--device", "cpu"], "tuning on cpu is not possible: needs a CUDA GPU"),
        (["rms", "--device", "cpu"], f"nothing to tune in 'rms'; there are {', '.join(OPS)}"),
        (["--device", "gpu"], "--device gpu: "),
    ],
)
def test_errors(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"pg-kernels: error: {error}")
