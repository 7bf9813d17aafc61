"""The command line that makes the built-in model: stages, scores, mask codec."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from .. import EMBEDDED_CHECKPOINT, PaliGemma, Processor
from ..segmentation import MaskVQVAE
from ..training.curves import draw_losses
from .evaluation import evaluate, table, table_rows
from .mask_vae import score_mask_vae, train_mask_vae
from .stages import STAGES, train_stages
from .tasks import Questions
from .world import FONT_PATH, World, render_glyphs

_CODEC = EMBEDDED_CHECKPOINT / "vae-oid.npz"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pg_kernels.model.embedded", description="Make the built-in model, and score it."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    training = commands.add_parser(
        "stages",
        help="train the model, stage after stage",
        description="Train the model, stage after stage; each leaves a Hugging Face folder of its own in FOLDER. Started again, "
        "it goes on where it was cut off.",
        formatter_class=show_defaults,
    )
    training.add_argument("folder", type=Path, metavar="FOLDER", help="where the stages go")
    training.add_argument("--seed", type=int, default=0, help="of weights and pictures")
    training.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    training.add_argument("--mask-codec", type=Path, default=_CODEC, help="the mask VQ-VAE, vae-oid.npz")
    training.add_argument(
        "--start", type=Path, metavar="CHECKPOINT", help="skip the first stages: go on from these weights"
    )
    training.add_argument(
        "--first", default=STAGES[0].name, choices=[stage.name for stage in STAGES], help="the first stage to run"
    )
    training.set_defaults(command=_stages)
    scoring = commands.add_parser(
        "evaluate",
        help="score a model on fresh pictures, task by task",
        description="Score a model on pictures that no training draws: a table of tasks and languages.",
        formatter_class=show_defaults,
    )
    scoring.add_argument(
        "folder", type=Path, nargs="?", default=EMBEDDED_CHECKPOINT, metavar="FOLDER", help="checkpoint"
    )
    scoring.add_argument("--count", type=int, default=500, help="questions for each row of the table")
    scoring.add_argument("--seed", type=int, default=1, help="of the pictures")
    scoring.add_argument("--task", action="append", help="only this one; may be given several times")
    scoring.add_argument("--json", action="store_true", help="print JSON")
    scoring.set_defaults(command=_evaluate)
    curves = commands.add_parser("curves", help="draw the loss curves of training runs", formatter_class=show_defaults)
    curves.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of a run, with its log.jsonl")
    curves.add_argument("--output", type=Path, default=Path("losses.png"), metavar="FILE", help="the picture")
    curves.set_defaults(command=lambda options: draw_losses(options.folders, options.output))
    masks = commands.add_parser("mask-vae", help="train the mask codec", formatter_class=show_defaults)
    masks.add_argument("file", type=Path, metavar="FILE", help="the .npz that it goes to")
    masks.add_argument("--steps", type=int, default=4000, help="how many")
    masks.add_argument("--seed", type=int, default=0, help="of everything")
    masks.set_defaults(command=_train_mask_vae)
    for command in (training, scoring, masks):
        command.add_argument("--font", type=Path, default=Path(FONT_PATH), help="NotoColorEmoji.ttf")
        command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(getattr(options, "threads", torch.get_num_threads()))
    try:
        options.command(options)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _stages(options: argparse.Namespace) -> None:
    first = [stage.name for stage in STAGES].index(options.first)
    if (first > 0) != (options.start is not None):
        raise ValueError("--start and --first: a stage after the first goes on from a checkpoint, so give both or none")
    train_stages(
        options.folder,
        World(options.font),
        MaskVQVAE.from_file(options.mask_codec),
        seed=options.seed,
        stages=STAGES[first:],
        start=options.start,
        workers=options.workers,
    )


def _evaluate(options: argparse.Namespace) -> None:
    model = PaliGemma.from_pretrained(options.folder, dtype=torch.float32)
    processor = Processor.from_pretrained(options.folder)
    questions = Questions(World(options.font), processor.mask_decoder)
    rows = list(table_rows(questions, processor.image_size))
    if options.task:
        tasks = {task for task, _ in rows}
        if unknown := set(options.task) - tasks:
            raise ValueError(f"--task: {', '.join(sorted(unknown))}; there are {', '.join(sorted(tasks))}")
        rows = [row for row in rows if row[0] in options.task]
    scores = evaluate(model, processor, questions, count=options.count, seed=options.seed, rows=rows)
    print(json.dumps([asdict(score) for score in scores], indent=1) if options.json else table(scores))


def _train_mask_vae(options: argparse.Namespace) -> None:
    alphas = [glyph.getchannel("A") for glyph in render_glyphs(options.font).values()]
    codec = train_mask_vae(options.file, alphas, steps=options.steps, seed=options.seed)
    print(score_mask_vae(codec, alphas, seed=options.seed + 1))


if __name__ == "__main__":
    sys.exit(main())
