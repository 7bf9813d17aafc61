"""`pg-kernels evaluate`: score a model on a data set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..evaluation.catalogue import ABOUT
from .common import add_model_arguments, choose_device, default_device, dtype_named, find_checkpoint, open_processor


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "evaluate",
        help="score a model on a task with the task's standard metric",
        description="Ask a model all the questions of a data set, in the data set's own file format, and score its answers\n"
        "with the task's standard metric. Scores go to stdout, times 100; progress goes to stderr.",
        epilog=_list_tasks(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(parser)
    add_model_arguments(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from ..evaluation.run import Predictions, ask, last_written, prepare, table
    from ..paligemma import PaliGemma

    evaluation = prepare(
        options.task,
        options.data,
        annotations=options.annotations,
        images=options.images,
        language=options.language,
        prompt=options.prompt,
        limit=options.limit,
    )
    checkpoint = find_checkpoint(options)
    origin = {"checkpoint": "built-in" if options.checkpoint is None else str(checkpoint.resolve())}
    origin |= {name: getattr(options, name) for name in ("quantize", "dtype", "resize", "num_beams", "max_new_tokens")}
    predictions = None
    if options.output is not None:
        made_with = {**origin, "checkpoint_written": last_written(checkpoint)}
        predictions = Predictions(options.output, evaluation, made_with, options.batch_size)
    device = choose_device(options.device or default_device())
    model = PaliGemma.from_pretrained(
        checkpoint, dtype=dtype_named(options.dtype), device=device, quantize=options.quantize
    )
    processor = open_processor(checkpoint, model.config, options)
    answers = ask(
        evaluation,
        model,
        processor,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        predictions=predictions,
    )
    scores = evaluation.score(answers, processor)
    counts = {file: len(questions) for file, questions in evaluation.subsets.items()}
    if options.json:
        from pg_kernels.benchmarks.measure.machine import device_name, versions

        asked = {"task": options.task, "prompt": evaluation.template, "questions": counts}
        machine = {"device": device_name(device), "versions": versions()}
        print(json.dumps({**asked, **origin, **machine, "scores": scores}, ensure_ascii=False))
    else:
        print("\n".join(table(scores, counts)))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what to evaluate on."""
    parser.add_argument("--task", choices=ABOUT, required=True, help="what to score; the list is below")
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


def _list_tasks() -> str:
    """List the tasks for the end of the help."""
    width = max(map(len, ABOUT))
    lines = [f"  {name:{width}}  {about}" for name, about in ABOUT.items()]
    return "\n".join(["tasks, their data and metrics:", *lines])
