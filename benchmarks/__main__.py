"""`python -m benchmarks`: reports, comparisons and the README's numbers from stored runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .compare import compare, markdown
from .readme import update
from .report import write
from .results import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command: 0 done, 1 failed or slower, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (OSError, ValueError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Make something of stored runs. Runs are made by `make bench`, `make bench-full` and `make gpu`.",
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

    readme = commands.add_parser("readme", help="rewrite README.md's performance section from stored runs")
    readme.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="a run's folder or JSON file")
    readme.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE", help="default: %(default)s")
    readme.set_defaults(command=_readme)
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
    changed = update(options.readme, [Run.load(path) for path in options.results])
    print(f"{options.readme} {'rewritten' if changed else 'was up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
