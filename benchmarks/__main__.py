"""`python -m benchmarks`: reports, comparisons and README's numbers from stored runs; the GPU resources of kernels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pg_kernels.benchmarks.kernels.extension import extension_kernels, installed_library
from pg_kernels.benchmarks.kernels.manifest import refresh
from pg_kernels.benchmarks.kernels.resources import DEVICES, DTYPES, TABLE_HEAD, Kernel, compile_all
from pg_kernels.benchmarks.report.compare import compare, markdown
from pg_kernels.benchmarks.report.markdown import write
from pg_kernels.benchmarks.report.readme import summary, tables, update
from pg_kernels.benchmarks.report.results import Run
from pg_kernels.benchmarks.sessions import drop_in
from pg_kernels.benchmarks.sessions.end_to_end import contenders
from pg_kernels.benchmarks.sessions.end_to_end import markdown as markdown_sessions
from pg_kernels.benchmarks.sessions.end_to_end import run as sessions
from pg_kernels.benchmarks.sessions.end_to_end_process import CONTENDERS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command: 0 done, 1 failed or slower, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Make something of stored runs, which `make bench`, `make bench-full` and `make gpu` store; "
        "or compile the kernels for GPUs that need not be here.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    report = commands.add_parser("report", help="tables and plots of one run or several")
    report.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="a run's folder or JSON file")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: the first run's folder)")
    report.set_defaults(command=_report)

    comparison = commands.add_parser(
        "compare", help="what became slower or faster between two runs; exits with 1 if slower"
    )
    comparison.add_argument("before", type=Path, metavar="BASE", help="a run's folder or JSON file")
    comparison.add_argument("after", type=Path, metavar="NEW", help="a run's folder or JSON file")
    comparison.set_defaults(command=_compare)

    readme = commands.add_parser(
        "readme",
        help="rewrite the performance sections of README.md (the first run) and docs/performance.md (all runs)",
    )
    readme.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="a run's folder or JSON file")
    readme.set_defaults(command=_readme)

    sessions = commands.add_parser(
        "session",
        help="load, first token, speed and memory of a whole model, ours and transformers'",
        description="Load a checkpoint of random weights and ask about images, each contender in processes of its own, in "
        "random order; store times, the most memory that a process took and what each part of our model, or each kernel of a "
        "GPU, took; of a GPU also a timeline, for https://ui.perfetto.dev.",
    )
    sessions.add_argument("out", type=Path, metavar="FOLDER", help="where session.json and session.md go")
    sessions.add_argument("--model", default="paligemma-3b-224", help="released shapes (default: %(default)s)")
    sessions.add_argument("--device", type=torch.device, default="cpu", help="default: %(default)s")
    sessions.add_argument(
        "--batch", type=int, action="append", metavar="B", help="prompts at once; may be repeated (default: 1)"
    )
    sessions.add_argument("--rounds", type=int, default=3, metavar="N", help="processes of each (default: %(default)s)")
    sessions.add_argument(
        "--contender", choices=CONTENDERS, action="append", help="may be repeated (default: all of them)"
    )
    sessions.set_defaults(command=_session)

    training = commands.add_parser(
        "drop-in",
        help="training with transformers, patched and not: time, memory, losses, on this CPU",
        description="Fine-tune the built-in model by LoRA with transformers' Trainer, and take steps over PaliGemma's whole "
        "vocabulary, each with transformers as it is and patched; store times, memory and losses.",
    )
    training.add_argument("out", type=Path, metavar="FOLDER", help="where drop-in.json, .md and .png go")
    training.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each (default: %(default)s)")
    training.set_defaults(command=_drop_in)

    resources = commands.add_parser(
        "resources",
        help="compile the Triton kernels for GPUs: a Markdown table of registers, spills, shared memory and tensor cores",
        description="Compile every launch that the Triton kernels can choose, and print what each takes, as a Markdown table. "
        "No GPU is needed. Exits with 1 if a kernel spills registers or exceeds the shared memory.",
    )
    resources.add_argument("ops", nargs="*", metavar="OP", help="e.g. rms_norm (default: all)")
    resources.add_argument("--target", choices=DEVICES, action="append", help="may be repeated (default: all of them)")
    resources.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated (default: all of them)")
    resources.add_argument("--extension", action="store_true", help="of the CUDA extension's kernels, not of Triton's")
    resources.set_defaults(command=_resources)

    manifest = commands.add_parser(
        "manifest",
        help="compile what a manifest of compiled kernels lacks, and rewrite it",
        description="Compile for every GPU the kernels that a manifest lacks because their source, constants or compiler are "
        "new, and rewrite it. Exits with 1 if a kernel spills registers or exceeds the shared memory.",
    )
    manifest.add_argument("file", type=Path, metavar="FILE", help="the repository's is benchmarks/kernels.csv")
    manifest.set_defaults(command=_manifest)
    return parser


def _report(options: argparse.Namespace) -> int:
    runs = [Run.load(path) for path in options.results]
    for path in write(runs, options.out or runs[0].path.parent):
        print(path)
    return 0


def _compare(options: argparse.Namespace) -> int:
    before, after = Run.load(options.before), Run.load(options.after)
    comparison = compare(before, after)
    print(markdown(comparison, before, after), end="")
    return 1 if comparison.of("slower") else 0


def _readme(options: argparse.Namespace) -> int:
    runs = [Run.load(path) for path in options.results]
    page = Path("docs/performance.md")
    for path, section in ((Path("README.md"), summary(runs[0], Path())), (page, tables(runs, page.parent))):
        print(f"{path} {'rewritten' if update(path, section) else 'was up to date'}")
    return 0


def _session(options: argparse.Namespace) -> int:
    batches = options.batch or [1]
    for name, number in (("--rounds", options.rounds), ("--batch", min(batches))):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: torch finds no CUDA GPU")
    names = [name for name in contenders(options.device) if name in (options.contender or CONTENDERS)]
    command = f"python -m benchmarks session --model {options.model} --device {options.device}"
    command += "".join(f" --batch {batch}" for batch in batches) + f" --rounds {options.rounds}"
    content = sessions(
        options.model,
        options.out,
        device=options.device,
        batches=batches,
        rounds=options.rounds,
        names=names,
        command=command,
    )
    print(markdown_sessions(content))
    return 1 if content["failed"] else 0


def _drop_in(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise ValueError(f"--rounds: expected at least 1, got {options.rounds}")
    content = drop_in.run(
        options.out, rounds=options.rounds, command=f"python -m benchmarks drop-in --rounds {options.rounds}"
    )
    print(drop_in.markdown(content))
    return 0


def _resources(options: argparse.Namespace) -> int:
    dtypes = [DTYPES[name] for name in options.dtype or DTYPES]
    faulty = 0
    print(TABLE_HEAD)
    for target in options.target or DEVICES:
        if options.extension:
            kernels = extension_kernels(target, installed_library())
        else:
            kernels = compile_all(target, dtypes, options.ops)
        for kernel in kernels:
            print(kernel.table_row, flush=True)
            faulty += _report_faults(kernel)
    return 1 if faulty else 0


def _manifest(options: argparse.Namespace) -> int:
    return 1 if sum(map(_report_faults, refresh(options.file))) else 0


def _report_faults(kernel: Kernel) -> bool:
    for fault in kernel.faults:
        print(f"{kernel.op} {kernel.name} for {kernel.target} ({kernel.launch}): {fault}", file=sys.stderr)
    return bool(kernel.faults)


if __name__ == "__main__":
    sys.exit(main())
