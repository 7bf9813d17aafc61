"""`python -m pg_kernels.model.training train FOLDER` makes the small model, `… evaluate [FOLDER]` scores it,
`… mask-vae FILE.npz` makes its mask codec."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch

from .. import EMBEDDED_CHECKPOINT, PaliGemma, Processor
from .evaluation import evaluate
from .loop import Recipe, train
from .mask_vae import score_mask_vae, train_mask_vae
from .world import FONT_PATH, World, render_glyphs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pg_kernels.model.training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    training = commands.add_parser(
        "train", help="train from scratch", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    training.add_argument("folder", type=Path, help="where the model goes; it is saved every 500 steps")
    training.add_argument("--start", type=Path, help="an earlier run's folder to go on from")
    for field in fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        training.add_argument(option, type=type(field.default), default=field.default, help="default: %(default)s")
    training.set_defaults(command=_train)
    scoring = commands.add_parser(
        "evaluate", help="score on fresh pictures", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    scoring.add_argument("folder", type=Path, nargs="?", default=EMBEDDED_CHECKPOINT, help="checkpoint")
    scoring.add_argument("--pictures", type=int, default=500, help="how many")
    scoring.add_argument("--seed", type=int, default=1, help="of the pictures")
    scoring.set_defaults(command=_evaluate)
    masks = commands.add_parser(
        "mask-vae", help="train the mask codec", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    masks.add_argument("file", type=Path, help="the .npz that it goes to")
    masks.add_argument("--steps", type=int, default=4000, help="how many")
    masks.add_argument("--seed", type=int, default=0, help="of everything")
    masks.set_defaults(command=_train_mask_vae)
    for command in (training, scoring, masks):
        command.add_argument("--font", type=Path, default=Path(FONT_PATH), help="NotoColorEmoji.ttf")
        command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        options.command(options)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _train(options: argparse.Namespace) -> None:
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    train(options.folder, recipe, World(options.font), start=options.start)


def _evaluate(options: argparse.Namespace) -> None:
    model = PaliGemma.from_pretrained(options.folder, dtype=torch.float32)
    processor = Processor.from_pretrained(options.folder)
    print(evaluate(model, processor, World(options.font), pictures=options.pictures, seed=options.seed))


def _train_mask_vae(options: argparse.Namespace) -> None:
    alphas = [glyph.getchannel("A") for glyph in render_glyphs(options.font).values()]
    codec = train_mask_vae(options.file, alphas, steps=options.steps, seed=options.seed)
    print(score_mask_vae(codec, alphas, seed=options.seed + 1))


if __name__ == "__main__":
    sys.exit(main())
