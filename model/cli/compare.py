"""`pg-kernels compare`: what int8 costs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pg_kernels.modes import ACTIVATIONS

from ..choices import DTYPES
from .common import add_checkpoint_arguments, choose_device, default_device, dtype_named, find_checkpoint

if TYPE_CHECKING:
    from PIL import Image

    from ..embedded.evaluation import Score
    from ..paligemma import PaliGemma
    from ..processor import Processor

_COMPARED = (("caption", "en"), ("vqa", "en"), ("detect", ""))
"""The tasks and languages on which the original and the quantised built-in model are scored."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "compare",
        help="what int8 costs: a quantised model beside its original",
        description="Compare a quantised model with its original: the relative error of every layer, how far the next token's "
        "distribution moves, how many answers stay the same. The built-in model is also scored on fresh pictures of "
        "emoji, for which Debian's fonts-noto-color-emoji and the extras train and evaluate must be there; other checkpoints "
        "need pictures.",
    )
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE", help="picture to ask about; several are several prompts"
    )
    parser.add_argument("--prompt", default="caption en", help="what to ask about each IMAGE (default: %(default)s)")
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--quantize", choices=ACTIVATIONS, default="int8", help="how to quantise it (default: %(default)s)"
    )
    parser.add_argument("--pictures", type=int, default=200, metavar="N", help="fresh ones (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the fresh pictures (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the original (default: the checkpoint's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from ..images import load_image
    from ..paligemma import PaliGemma
    from ..processor import Processor
    from ..quality import compare, table

    if bool(options.images) == (options.checkpoint is None):
        raise ValueError("give images with --checkpoint; the built-in model, without it, gets fresh pictures")
    if options.pictures < 1:
        raise ValueError(f"--pictures: expected at least 1, got {options.pictures}")
    device, checkpoint = choose_device(options.device or default_device()), find_checkpoint(options)
    processor = Processor.from_pretrained(checkpoint)
    tasks, score = [(load_image(path), options.prompt) for path in options.images], None
    if not tasks:
        tasks, score = _fresh_pictures(options, processor)
    original, quantised = (
        PaliGemma.from_pretrained(checkpoint, dtype=dtype_named(options.dtype), device=device, quantize=mode)
        for mode in (None, options.quantize)
    )
    found = compare(original, quantised, processor, tasks)
    models = {"original": original, options.quantize: quantised}
    scores = {} if score is None else {name: score(model) for name, model in models.items()}
    if options.json:
        from pg_kernels.benchmarks.measure.machine import device_name, versions

        origin = {"checkpoint": str(checkpoint), "quantize": options.quantize, "device": device_name(device)}
        if not options.images:
            origin = {**origin, "checkpoint": "built-in", "pictures": options.pictures, "seed": options.seed}
        else:
            origin = {**origin, "prompt": options.prompt}
        tables = {name: [asdict(row) for row in rows] for name, rows in scores.items()}
        results = {**found.as_json(), "scores": tables}
        print(json.dumps({**origin, "versions": versions(), **results}, ensure_ascii=False))
        return
    print(f"Relative error of each layer's output, {options.quantize} against the original:")
    for line in table(found.layers):
        print(f"  {line}")
    print(f"\nOver {found.tokens} tokens of {found.prompts} answers:")
    print(f"  KL divergence        {found.kl_divergence:.2e} nats a token")
    print(f"  same likeliest token {found.top1_agreement:.2%}")
    print(f"  same answers         {found.same_answers:.2%}")
    for name, rows in scores.items():
        print(f"\n{name}")
        for row in rows:
            print(f"  {f'{row.task} {row.language}':20} {row.metric:16} {row.value:.1%} of {row.count}")


def _fresh_pictures(
    options: argparse.Namespace, processor: Processor
) -> tuple[list[tuple[Image.Image, str]], Callable[[PaliGemma], list[Score]]]:
    """Return prompts about the built-in model's pictures, and a function that scores a model on them."""
    from ..embedded import tasks, world
    from ..embedded.evaluation import evaluate, held_out_rng, table_rows

    questions = tasks.Questions(world.World(), processor.mask_decoder)
    rows = {key: draw for key, draw in table_rows(questions, processor.image_size).items() if key in _COMPARED}
    asked = [draw(held_out_rng(options.seed, *key, i)) for key, draw in rows.items() for i in range(options.pictures)]
    return [(example.images[0], example.prefix) for example in asked], partial(
        evaluate, processor=processor, questions=questions, count=options.pictures, seed=options.seed, rows=rows
    )
