"""Teach the built-in model to read handwritten digits with `pg-kernels finetune`: all of it, then by LoRA, then killed halfway.

python examples/finetune_digits.py [--steps N] [--folder FOLDER] …     # needs scikit-learn
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_digits

from pg_kernels.model import cli

QUESTION = "answer en which digit?"


def write_lines(path: Path, images: Any, digits: Any) -> None:
    """Write enlarged 8x8 pictures and one JSON line for each."""
    path.with_suffix("").mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for index, (image, digit) in enumerate(zip(images, digits, strict=True)):
            name = f"{path.stem}/{index}.png"
            picture = Image.fromarray((image * 255 / 16).astype("uint8"))
            picture.resize((224, 224), Image.Resampling.BICUBIC).save(path.parent / name)
            file.write(json.dumps({"image": name, "prefix": QUESTION, "suffix": str(digit)}) + "\n")


def command(folder: Path, output: str, *options: object) -> list[str]:
    files = ("--data", folder / "train.jsonl", "--eval-data", folder / "test.jsonl", "--output", folder / output)
    words = ["finetune", *map(str, (*files, *options))]
    print(f"$ pg-kernels {shlex.join(words)}", flush=True)
    return words


def run(words: list[str]) -> None:
    if code := cli.main(words):
        raise SystemExit(code)


def run_and_report(folder: Path, output: str, *options: object) -> None:
    started = time.perf_counter()
    run(command(folder, output, *options))
    minutes = (time.perf_counter() - started) / 60
    lines = [json.loads(line) for line in (folder / output / "log.jsonl").read_text().splitlines()]
    before, *_, after = (line["exact_match"] for line in lines if line["kind"] == "evaluation")
    print(
        f"{output}: {before:.1%} of held-out digits right before, {after:.1%} after; {minutes:.1f} minutes\n",
        flush=True,
    )


def run_and_kill(words: list[str], checkpoint: Path) -> None:
    """Run the command in a process of its own until it has written a checkpoint, then kill it."""
    process = subprocess.Popen([sys.executable, "-m", "pg_kernels", *words])
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.1)
    process.kill()
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=int, default=1400, help="digits to learn (default: %(default)s)")
    parser.add_argument("--test", type=int, default=397, help="digits held out (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="digits a step (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="keep everything there (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        images, digits = load_digits(return_X_y=True)
        images, n = images.reshape(-1, 8, 8), options.train
        write_lines(folder / "train.jsonl", images[:n], digits[:n])
        write_lines(folder / "test.jsonl", images[n : n + options.test], digits[n : n + options.test])

        schedule = ("--steps", options.steps, "--save-every", max(1, options.steps // 5), "--batch-size", options.batch)
        full = (*schedule, "--learning-rate", 1e-3)
        run_and_report(folder, "full", *full)
        adapter = ("--learning-rate", 5e-3, "--lora", 16, "--lora-targets", ".*_proj|.*fc[12]|.*linear")
        run_and_report(folder, "lora", *schedule, *adapter)
        words = command(folder, "killed", *full)
        run_and_kill(words, folder / "killed" / "checkpoint.safetensors")
        print("killed, as a machine that goes down would have done; the same command again:", flush=True)
        run(words)
        whole, resumed = (folder / output / "model.safetensors" for output in ("full", "killed"))
        same = whole.read_bytes() == resumed.read_bytes()
        print(
            f"weights of the run that was killed and of the one that was not: {'the same' if same else 'NOT the same'}"
        )


if __name__ == "__main__":
    main()
