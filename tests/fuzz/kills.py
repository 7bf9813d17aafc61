"""Stop runs of `pg-kernels finetune` at random moments, resume, and require weights bit-equal to an undisturbed run's.

python tests/fuzz/kills.py [--kill N] [--terminate N] [--interrupt N] [--seed N]; exits with 1 if weights differ.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

import torch  # noqa: E402
from tiny import FAST, write_checkpoint, write_data  # noqa: E402
from tqdm import tqdm  # noqa: E402

from pg_kernels.model import cli  # noqa: E402

# Every step writes a checkpoint, so that half of the moments are in the middle of writing one.
RUN = (*FAST, "--workers", 1, "--steps", 12, "--save-every", 1, "--eval-every", 4, "--patience", 9)


def campaign(folder: Path, counts: dict[int, int], seed: int, say: Callable[[str], None]) -> Counter[str]:
    """Stop as many runs by each signal as `counts` says, and count the outcomes. Raises AssertionError if weights differ."""
    checkpoint, data = write_checkpoint(folder / "checkpoint"), write_data(folder)
    common = ("finetune", "--checkpoint", checkpoint, "--data", data, "--eval-data", data, *RUN, "--output")
    with contextlib.redirect_stderr(io.StringIO()):  # in this process, so that forks inherit all imports
        assert cli.main([str(word) for word in (*common, folder / "whole")]) == 0
    whole = (folder / "whole/model.safetensors").read_bytes()
    entries = _lines(folder / "whole")
    started = time.monotonic()
    assert _end(_start(*common, folder / "timed")) == 0
    a_step = (time.monotonic() - started) / entries
    rng, outcomes = random.Random(seed), Counter[str]()
    for signum, count in counts.items():
        name, done = signal.Signals(signum).name, 0
        while done < count:
            output = folder / f"{name}{rng.getrandbits(64):x}"
            process = _start(*common, output)
            line, more = min(rng.randint(0, entries + 4), entries), rng.uniform(0, a_step)  # often at the end
            while process.exitcode is None and _lines(output) < line:
                time.sleep(a_step / 50)
            time.sleep(more)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, signum)
            code = _end(process)
            moment = f"{name} {more:.3f} s after line {line} of the log"
            # While a model loads, torch may turn a KeyboardInterrupt into another error.
            if code not in (0, -signum, 128 + signum) and not (signum == signal.SIGINT and line == 0):
                raise AssertionError(f"{moment}: exit code {code}\n{Path(f'{output}.txt').read_text()}")
            left = "without a checkpoint"
            if (output / "checkpoint.safetensors").exists():
                left = "after the last step" if (output / "config.json").exists() else "with a checkpoint"
            if [*output.glob(".????????.*"), *folder.glob(f".????????.{output.name}")]:
                left += ", a file half-written"
            if _end(_start(*common, output)) != 0:
                raise AssertionError(f"{moment}: it does not go on")
            if (output / "model.safetensors").read_bytes() != whole:
                raise AssertionError(f"{moment}: other weights")
            if hidden := [*output.glob(".*"), *folder.glob(".*")]:
                raise AssertionError(f"{moment}: it leaves {hidden}")
            if code != 0:  # else the run had finished
                done += 1
                outcomes[f"{name}, exit code {code}, {left}"] += 1
                say(f"{moment}, {left}: the same weights")
    return outcomes


def _lines(output: Path) -> int:
    log = output / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def _start(*words: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_run, args=([str(word) for word in words],))
    process.start()
    return process


def _run(words: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tqdm.set_lock(threading.RLock())  # the default lock is shared with other forks, and a killed fork might hold it
    said = os.open(f"{words[-1]}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        os._exit(cli.main(words))
    except KeyboardInterrupt:  # before `main` began
        os._exit(130)


def _end(process: multiprocessing.process.BaseProcess) -> int:
    """Wait for the process only. `join` with a timeout also waits for its workers, which outlive it by seconds."""
    deadline = time.monotonic() + 120
    while process.exitcode is None:
        time.sleep(0.005)
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError("a run hangs")
    return process.exitcode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kill", type=int, default=20, metavar="N", help="runs to SIGKILL (default: %(default)s)")
    parser.add_argument("--terminate", type=int, default=5, metavar="N", help="to SIGTERM (default: %(default)s)")
    parser.add_argument("--interrupt", type=int, default=5, metavar="N", help="to SIGINT (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts = {signal.SIGKILL: options.kill, signal.SIGTERM: options.terminate, signal.SIGINT: options.interrupt}
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcomes = campaign(Path(folder), counts, options.seed, lambda line: print(line, flush=True))
        except AssertionError as error:
            print(f"kills: {error}", file=sys.stderr)
            return 1
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:4} {outcome}")
    print(f"{outcomes.total():4} runs, all with the weights of the undisturbed one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
