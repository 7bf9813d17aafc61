"""The arguments of `pg-kernels evaluate`; the command itself is in `pg_kernels.model.cli`, with what commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from .tasks import TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says what to evaluate on; the model's own arguments are added by the command line."""
    parser.add_argument("--task", choices=TASKS, required=True, help="what to score; the list is below")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="file in the data set's own format; several are scored each by itself, and their mean is given",
    )
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="VQAv2's answers, for its file of questions")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="where the images are (default: where the data file is)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="predictions, as JSON lines; started again, the command goes on with what is there",
    )
    parser.add_argument(
        "--prompt", metavar="TEMPLATE", help="what to ask, e.g. '{question}' (default: as released models are asked)"
    )
    parser.add_argument(
        "--language", default="en", metavar="CODE", help="{lang} of prompts, and of captions (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N questions of each file")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="questions at a time (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the task's)")
    parser.add_argument(
        "--num-beams", type=int, default=1, metavar="N", help="beam search with N beams (default: greedy)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; scores in it are fractions")


def tasks_in_lines() -> str:
    """The tasks, for the end of the help."""
    width = max(map(len, TASKS))
    lines = [f"  {name:{width}}  {task.about}" for name, task in TASKS.items()]
    return "\n".join(["tasks, their data and metrics:", *lines])
