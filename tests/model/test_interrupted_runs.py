"""A run of `pg-kernels finetune` stopped by a signal, a damaged file or a full disk resumes bit-equally."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAST

from pg_kernels.model import PaliGemma, cli
from pg_kernels.model.files import temporary_sibling
from pg_kernels.model.training import fingerprint
from pg_kernels.model.training.curves import draw_losses
from pg_kernels.model.training.data import Collator, JsonLines, UnreadableImage
from pg_kernels.model.training.finetune import HeldOutEvaluation
from pg_kernels.model.training.interruption import SIGNALS, Signals
from pg_kernels.model.training.lock import exclusive
from pg_kernels.model.training.progress import Progress
from pg_kernels.model.training.state import State

LORA = (*FAST, "--lora", 2, "--lora-dropout", 0.2)


def finetune(*arguments: object) -> int:
    return cli.main(["finetune", *map(str, arguments)])


def in_a_process(function: Callable[[], object]) -> multiprocessing.Process:
    """Run a function that would end this process in a forked process, which exits with the function's result."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(int(function() or 0)))  # type: ignore[call-overload]
    process.start()
    return process  # type: ignore[return-value]


def kill_in_call(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *signals: int, pause: float = 0.3
) -> list[int]:
    """Send signals to this process at the start of a method's n-th call (from 1). The list receives the calls that return."""
    original, began, ended = getattr(owner, name), [], []

    def method(self: Any, *arguments: Any) -> Any:
        began.append(1)
        if len(began) == call:
            for number, signum in enumerate(signals):
                time.sleep(pause * (number > 0))
                os.kill(os.getpid(), signum)
        result = original(self, *arguments)
        ended.append(len(began))
        return result

    monkeypatch.setattr(owner, name, method)
    return ended


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Reset the signal handlers to a shell's. In the background, SIGINT and SIGHUP may be ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in usual.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def weights(folder: Path) -> bytes:
    return next(folder.glob("*model.safetensors")).read_bytes()


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the log without times."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if "second" not in key} for line in found]


def step_of(folder: Path) -> int:
    with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["state"])["step"]


@pytest.fixture(scope="module")
def whole(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run 4 steps of an adapter without interruption, evaluating after every second step."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    common = ("--checkpoint", checkpoint, "--data", data, "--eval-data", data, "--output", folder)
    assert finetune(*common, *LORA, "--steps", 4, "--eval-every", 2) == 0
    return folder


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    signum: int,
    whole: Path,
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ("--checkpoint", checkpoint, "--data", data, "--eval-data", data, "--output", tmp_path / "out")
    before = [signal.getsignal(one) for one in SIGNALS]
    with monkeypatch.context() as patch:
        # Twice at once, as `timeout` and others send it to the process and to its group.
        kill_in_call(patch, State, "save", 1, signum, signum, pause=0.01)
        arguments = (*common, *LORA, "--steps", 4, "--eval-every", 2, "--save-every", 1, "--restart")
        assert finetune(*arguments) == 128 + signum
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert step_of(tmp_path / "out") in (1, 2) and not (tmp_path / "out/.lock").exists()
    *_, said = capsys.readouterr().err.strip().splitlines()
    stopped, _, command = said.partition("; go on with: ")
    assert f"{signal.Signals(signum).name}: stopped after step" in stopped
    words = shlex.split(command)
    assert words[:2] == ["pg-kernels", "finetune"] and "--restart" not in words
    assert cli.main(words[1:]) == 0
    assert weights(tmp_path / "out") == weights(whole)
    assert lines(tmp_path / "out") == lines(whole)


def test_an_evaluation_is_broken_off_and_done_again(
    whole: Path, checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--checkpoint", checkpoint, "--data", data, "--eval-data", data, "--output", tmp_path / "out")
    common = (*common, *LORA, "--steps", 4, "--eval-every", 2)
    with monkeypatch.context() as patch:
        ended = kill_in_call(patch, HeldOutEvaluation, "__call__", 2, signal.SIGTERM)
        assert finetune(*common) == 143
        assert ended == [1] and step_of(tmp_path / "out") == 2
    assert finetune(*common) == 0
    assert weights(tmp_path / "out") == weights(whole) and lines(tmp_path / "out") == lines(whole)


def test_a_second_signal_stops_at_once(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--checkpoint", checkpoint, "--data", data, "--output", tmp_path / "out", *FAST, "--steps", 9)
    for signals, code in (((signal.SIGTERM,) * 2, -signal.SIGTERM), ((signal.SIGTERM, signal.SIGINT), 130)):
        with monkeypatch.context() as patch:
            kill_in_call(patch, Collator, "__call__", 3, *signals)
            process = in_a_process(lambda: finetune(*common))
            process.join()
        assert process.exitcode == code
        assert not (tmp_path / "out/checkpoint.safetensors").exists()


def test_signals_that_are_ignored_stay_ignored_and_other_threads_change_nothing() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == 0
    finally:
        signal.signal(signal.SIGHUP, previous)
    handlers = []

    def inside() -> None:
        with Signals():
            handlers.extend(signal.getsignal(signum) for signum in SIGNALS)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signum) for signum in SIGNALS]


def test_a_run_in_another_thread(whole: Path, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    common = ("--checkpoint", checkpoint, "--data", data, "--eval-data", data, "--output", tmp_path / "out")
    codes = []
    arguments = (*common, *LORA, "--steps", 4, "--eval-every", 2)
    thread = threading.Thread(target=lambda: codes.append(finetune(*arguments)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert lines(tmp_path / "out") == lines(whole)


def run_two(monkeypatch: pytest.MonkeyPatch, signalled: int | None, *arguments: object) -> list[int | None]:
    """Run two processes, of which one receives SIGTERM while it makes its third batch, and return their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> int:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
        os.environ["MASTER_PORT"] = str(port)
        if rank == signalled:
            kill_in_call(monkeypatch, Collator, "__call__", 3, signal.SIGTERM)
        return finetune(*arguments)

    processes = [in_a_process(lambda rank=rank: run(rank)) for rank in range(2)]  # type: ignore[misc]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_two_processes_agree_where_to_stop(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def arguments(folder: str) -> tuple[object, ...]:
        return ("--checkpoint", checkpoint, "--data", data, "--output", tmp_path / folder, *FAST, "--steps", 4)

    assert run_two(monkeypatch, None, *arguments("whole")) == [0, 0]
    assert run_two(monkeypatch, 1, *arguments("cut")) == [143, 143]
    assert step_of(tmp_path / "cut") == 2
    assert capfd.readouterr().err.count("go on with: torchrun … pg-kernels finetune") == 1
    with exclusive(tmp_path / "cut"):
        assert run_two(monkeypatch, None, *arguments("cut")) == [1, 1]
    assert run_two(monkeypatch, None, *arguments("cut")) == [0, 0]
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    (data.parent / "white.png").rename(tmp_path / "white.png")
    try:
        Image.effect_noise((20, 20), 50).save(data.parent / "white.png")
        truncate(data.parent / "white.png")
        assert run_two(monkeypatch, None, *arguments("unreadable")) == [1, 1]
        assert step_of(tmp_path / "unreadable") == 0
    finally:
        (tmp_path / "white.png").replace(data.parent / "white.png")


def test_checkpoints_come_by_time_too(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--checkpoint", checkpoint, "--data", data, *FAST, "--steps", 4)
    for minutes, saved in ((1e-9, [1, 2, 3, 4]), ("inf", [4])):
        found: list[int] = []
        with monkeypatch.context() as patch:
            save = State.save
            patch.setattr(State, "save", lambda state: found.append(state.step) or save(state))  # noqa: B023
            assert finetune(*common, "--output", tmp_path / f"{minutes}", "--save-minutes", minutes) == 0
        assert found == saved


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    """Return a copy of the data that a test can change."""
    shutil.copytree(data.parent, tmp_path / "data")
    return tmp_path / "data/data.jsonl"


def test_an_unreadable_image_stops_the_run_after_a_checkpoint(
    whole: Path, checkpoint: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--checkpoint", checkpoint, "--data", copied, "--output", tmp_path / "out", *FAST)
    common = (*common, "--workers", 1, "--micro-batch", 1, "--batch-size", 2, "--epochs", 2, "--lora", 2)
    assert finetune(*common[:4], "--output", tmp_path / "good", *common[6:]) == 0
    blue = copied.parent / "blue.png"
    good = blue.read_bytes()
    truncate(blue)
    capsys.readouterr()
    assert finetune(*common) == 1
    *_, said = capsys.readouterr().err.strip().splitlines()
    assert f"error: {copied}, line " in said and f"image: {blue}: cannot read" in said and "--skip-unreadable" in said
    assert "Traceback" not in said and "go on with: pg-kernels finetune" in said
    at = step_of(tmp_path / "out")
    assert at < 6 and not (tmp_path / "out/adapter_config.json").exists()

    shutil.copytree(tmp_path / "out", tmp_path / "skipping")
    skipping = (*common[:4], "--output", tmp_path / "skipping", *common[6:], "--skip-unreadable")
    assert finetune(*skipping) == 0
    said = capsys.readouterr().err
    assert "4 examples were skipped" in said and said.count(f"image: {blue}") == 2
    assert finetune(*(*common[:4], "--output", tmp_path / "skipped", *common[6:], "--skip-unreadable")) == 0
    assert weights(tmp_path / "skipping") == weights(tmp_path / "skipped") != weights(tmp_path / "good")
    log = lines(tmp_path / "skipping")
    assert log == lines(tmp_path / "skipped")
    assert log[-1] == {"step": 6, "kind": "skipped", "examples": 4} and sum(line.get("skipped", 0) for line in log) == 4

    blue.write_bytes(good)
    assert finetune(*common) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "good")


def test_skipped_examples_count_for_nothing(
    checkpoint: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Skipping gives the run of the remaining examples, also where a step or an evaluation has only skipped ones."""
    common = ("--checkpoint", checkpoint, "--images", copied.parent, *FAST, "--batch-size", 3, "--steps", 2)
    rows = copied.read_text().splitlines()
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(rows[:2]))
    some = tmp_path / "some.jsonl"
    some.write_text("\n".join((*rows[:2], json.dumps({"image": "none.png", "prefix": "what", "suffix": "x"}))))
    for name, lines_ in (("few", few), ("some", some)):
        options = ("--data", lines_, "--eval-data", lines_, "--output", tmp_path / name, "--skip-unreadable")
        size = ("--batch-size", 2) if name == "few" else ()
        assert finetune(*common, *options, *size) == 0
    one, other = lines(tmp_path / "few"), lines(tmp_path / "some")
    for line, same in zip(one, other, strict=False):
        assert same["loss"] == pytest.approx(line["loss"], rel=1e-4)
        assert same["skipped"] == 1
    assert f"{some}, line 3, image: {copied.parent / 'none.png'}" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text(json.dumps({"image": "none.png", "prefix": "what", "suffix": "x"}))
    with pytest.raises(UnreadableImage, match="bad.jsonl, line 1, image: .*none.png does not exist"):
        JsonLines(tmp_path / "bad.jsonl", skip_unreadable=True)


def test_a_folder_has_one_run(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second run is refused before any work. The lock ends with its process, however that ends, despite living children."""
    folder = tmp_path / "out"
    children = tmp_path / "children"

    def hold() -> None:
        with exclusive(folder), exclusive(folder):
            os.fork()  # as DataLoader does for its workers
            with temporary_sibling(folder / "adapter") as temporary:
                temporary.mkdir()
                with children.open("a") as file:
                    file.write(f"{os.getpid()}\n")
                time.sleep(60)

    holder = in_a_process(hold)
    while not children.exists() or children.read_text().count("\n") < 2:
        time.sleep(0.01)
    common = ("--checkpoint", checkpoint, "--data", data, "--output", folder, *FAST, "--steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr(PaliGemma, "from_pretrained", None)
        assert finetune(*common) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "out: another run is writing to this folder" in said[0]
    assert len(list(folder.glob(".????????.adapter"))) == 2
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    try:
        assert finetune(*common) == 0
    finally:
        for pid in map(int, children.read_text().split()):
            if pid != holder.pid:
                os.kill(pid, signal.SIGKILL)
    assert not list(folder.glob(".*"))

    refused = []

    def second() -> None:
        try:
            with exclusive(tmp_path / "new"):
                pass
        except OSError as error:
            refused.append(str(error))

    with exclusive(tmp_path / "new"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1 and not (tmp_path / "new").exists()


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    ours = [".0123abcd.out", "out/.89abcdef.checkpoint.safetensors", "out/.89abcdef.adapter"]
    others = [
        ".0123abcd.out2",
        ".0123abc.out",
        "out/.gitignore",
        "out/.0123abcd",
        "out/.cache.json",
        "out/tokenizer.json",
    ]
    for name in (*ours, *others):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("") if "." in path.name[10:] else path.mkdir()
    with exclusive(tmp_path / "out"):
        assert not any((tmp_path / name).exists() for name in ours)
        assert all((tmp_path / name).exists() for name in others)


def cut(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Begin a run and stop it in its third step."""
    with monkeypatch.context() as patch:
        kill_in_call(patch, Collator, "__call__", 3, signal.SIGTERM)
        assert finetune(*arguments, "--output", folder) == 143


def test_other_files_under_the_same_names_are_noticed(
    checkpoint: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint, tmp_path / "base")
    shutil.copytree(copied.parent, tmp_path / "others")
    Image.new("RGB", (10, 10), "green").save(tmp_path / "others/red.png")
    shutil.copytree(copied.parent, tmp_path / "evaluated")
    base = ("--checkpoint", tmp_path / "base", "--data", copied, *FAST, "--steps", 4)
    common = (*base, "--eval-data", tmp_path / "evaluated/data.jsonl")
    cut(tmp_path / "out", monkeypatch, *common)

    def refused(*options: object) -> str:
        capsys.readouterr()
        assert finetune(*common, "--output", tmp_path / "out", *options) == 1
        return capsys.readouterr().err

    assert "out/checkpoint.safetensors is of another run: the images' content was" in refused(
        "--images", tmp_path / "others"
    )
    shutil.copy(tmp_path / "others/red.png", tmp_path / "evaluated/red.png")
    assert "the images' content was" in refused()
    shutil.copy(copied.parent / "red.png", tmp_path / "evaluated/red.png")
    tensors = load_file(checkpoint / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "base/model.safetensors", {"format": "pt"})
    assert "the checkpoint's content was" in refused()
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "base/model.safetensors")
    copied.parent.rename(tmp_path / "moved")
    (tmp_path / "base").rename(tmp_path / "moved base")
    moved = ("--checkpoint", tmp_path / "moved base", "--data", tmp_path / "moved/data.jsonl", *common[4:])
    assert finetune(*moved, "--output", tmp_path / "out") == 0
    assert finetune(*moved, "--output", tmp_path / "moved base", "--restart") == 1
    assert "is the checkpoint's folder" in capsys.readouterr().err


def test_fingerprints_tell_contents_apart(tmp_path: Path) -> None:
    large = tmp_path / "large.bmp"
    seen = set()
    for first, last in ((0, 0), (0, 1), (799_999, 800_000), (300_000, 400_000), (0, 800_001)):
        content = bytearray(800_000)
        content[first:last] = b"x" * (last - first)
        large.write_bytes(content)
        seen.add(fingerprint.of_files([large]))
    assert len(seen) == 5
    assert fingerprint.of_files([large, tmp_path / "none"]) != fingerprint.of_files([large])
    found = []
    for value in (1, 2):
        np.savez(tmp_path / "model.npz", a=np.full(100_000, value, np.float32), b=np.zeros(3, np.float32))
        found.append(fingerprint.of_checkpoint(tmp_path / "model.npz"))
    assert found[0] != found[1]
    assert fingerprint.of_checkpoint(tmp_path / "google/paligemma") == str(tmp_path / "google/paligemma")


def test_a_damaged_log_is_named_and_half_a_line_is_healed(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--checkpoint", checkpoint, "--data", data, *FAST, "--steps", 4)
    cut(tmp_path / "out", monkeypatch, *common)
    log = tmp_path / "out/log.jsonl"
    good = log.read_bytes()
    first, second = good.splitlines(keepends=True)
    for damaged, message in (
        (first + b"\x00\xff\x80 junk\n" + second, "log.jsonl, line 2: damaged, it is not JSON"),
        (first + b"\x00\x00\x00", "line 2: damaged, it is not JSON"),
        (first[: len(first) // 2] + b"\n" + second, "line 1: damaged"),
        (first + b"[1]\n", "line 2: damaged, expected an object, got list"),
        (b'{"step": "1", "kind": "train", "loss": 1.0}\n', "line 1: damaged, expected 'step' to be a int, got '1'"),
        (b'{"step": 1, "kind": null}\n', "expected 'kind' to be a str, got None"),
        (b'{"step": 1, "kind": "train"}\n', "expected 'loss' to be a float, got None"),
        (b"[" * 100_000 + b"\n", "line 1: damaged"),
    ):
        log.write_bytes(damaged)
        capsys.readouterr()
        assert finetune(*common, "--output", tmp_path / "out") == 1
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and message in said[0]
        with pytest.raises(ValueError, match="log.jsonl, line"):
            draw_losses([tmp_path / "out"], tmp_path / "losses.png")
        assert log.read_bytes() == damaged
    log.write_bytes(good + b'{"step": 3, "ki')
    assert finetune(*common, "--output", tmp_path / "out") == 0
    assert [line["step"] for line in lines(tmp_path / "out")] == [1, 2, 3, 4]


def test_damaged_checkpoints_are_named(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--checkpoint", checkpoint, "--data", data, "--eval-data", data, *FAST)
    common = (*common, "--steps", 4, "--patience", 9, "--eval-every", 2, "--output", tmp_path / "out")
    cut(tmp_path / "out", monkeypatch, *common[:-2])
    path, best = tmp_path / "out/checkpoint.safetensors", tmp_path / "out/best.safetensors"
    good, tensors = path.read_bytes(), {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        state = file.metadata()["state"]
    for name, content in (
        ("truncated", good[: len(good) // 2]),
        ("empty", b""),
        ("no safetensors", b"\xff" * 1000),
        ("another file", (checkpoint / "model.safetensors").read_bytes()),
        ("no state", (tensors, {"state": "{}"})),
        ("wrong types", (tensors, {"state": re.sub('"step": [0-9]', '"step": "2"', state)})),
        ("a tensor is missing", (dict(list(tensors.items())[5:]), {"state": state})),
        ("a tensor of another shape", ({n: t.flatten()[:3].clone() for n, t in tensors.items()}, {"state": state})),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else save_file(content[0], path, content[1])
        capsys.readouterr()
        assert finetune(*common) == 1, name
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and f"{path} cannot be read as a checkpoint" in said[0] and "--restart" in said[0], name
    path.write_bytes(good)
    for content in (b"junk", None):
        best.unlink()
        if content:
            best.write_bytes(content)
        assert finetune(*common) == 1
        assert "best.safetensors" in (said := capsys.readouterr().err) and "--restart" in said
    assert finetune(*common, "--restart") == 0


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    common = ("--checkpoint", checkpoint, "--data", data, "--output", tmp_path / "out", *FAST, "--steps", 5)
    save = State.save

    def save_on_a_full_disk(state: State) -> None:
        if state.step == 3:  # log.jsonl fits below this file size limit, larger files do not
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        save(state)

    monkeypatch.setattr(State, "save", save_on_a_full_disk)
    process = in_a_process(lambda: finetune(*common, "--save-every", 1))
    process.join()
    monkeypatch.undo()
    assert process.exitcode == 1
    *_, said = capfd.readouterr().err.strip().splitlines()
    assert "pg-kernels: error: " in said and f"cannot write {tmp_path / 'out/checkpoint.safetensors'}: " in said
    assert step_of(tmp_path / "out") == 2 and not list((tmp_path / "out").glob(".*"))
    assert finetune(*common) == 0

    def full(*_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))

    with pytest.MonkeyPatch.context() as patch:  # now the result of an adapter, which PEFT writes
        kill_in_call(patch, State, "save", 1)
        patch.setattr(State, "save", lambda state: (save(state), full()))
        adapter = in_a_process(lambda: finetune(*common[:4], "--output", tmp_path / "lora", *LORA, "--steps", 1))
        adapter.join()
    assert adapter.exitcode == 1
    *_, said = capfd.readouterr().err.strip().splitlines()
    assert "pg-kernels: error: " in said and "cannot write" in said
    assert step_of(tmp_path / "lora") == 1


def test_steps_are_lines_in_a_pipe_and_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def show() -> str:
        with Progress(2, 5) as progress:
            for step in (3, 4, 5):
                progress.update(step, 1.5, 1e-3)
            progress.write("done")
        return capsys.readouterr().err

    # The step in between leaves no checkpoint: less than 10 seconds have passed.
    first, last, done = show().splitlines()
    assert first.startswith("step 3/5: loss 1.5000, learning rate 1.00e-03, ") and first.endswith(" left")
    assert last.startswith("step 5/5: loss 1.5000") and last.endswith("00:00 left") and done == "done"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    said = show()
    assert "\r" in said and "/5" in said and "done" in said and "step 3/5:" not in said


def test_a_reader_that_is_gone_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        with Progress(0, 1) as progress:
            progress.update(1, 1.0, 1.0)
            progress.write("still here")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)
