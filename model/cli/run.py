"""`pg-kernels run`: answer a prompt about an image."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import GRAMMARS
from .common import (
    add_model_arguments,
    check_drawing,
    choose_device,
    default_device,
    dtype_named,
    find_checkpoint,
    note,
    open_processor,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..locations import Detection


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "run",
        help="answer a prompt about an image",
        description="Answer a prompt about one or several images. The answer goes to stdout, progress to stderr.",
        epilog="Prompts the released models know: 'caption en', 'ocr', 'answer en QUESTION', 'detect THING ; THING', "
        "'segment THING'. The built-in model knows them all in its world of emoji, words and charts.",
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="image file; several make one prompt's images"
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to ask, e.g. 'caption en' or 'detect cat'")
    add_model_arguments(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy; above it, draw (default: 0)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens that reach probability P"
    )
    parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search with N beams")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument(
        "--constrain", choices=GRAMMARS, help="allow only objects: boxes and labels, with segment also masks"
    )
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end the answer after TEXT; may be repeated")
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes")
    parser.add_argument(
        "--draw", type=Path, metavar="FILE", help="write the image with the answer's boxes and masks drawn"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: text, objects with scores and masks, tokens, seconds",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    import torch

    from ..files import temporary_sibling
    from ..images import load_image
    from ..paligemma import PaliGemma

    if options.stream and (options.json or options.num_beams > 1):
        raise ValueError("--stream prints text as it comes: it goes with neither --json nor --num-beams")
    if options.draw is not None:
        check_drawing(options.draw, len(options.images))
    if not -(2**63) <= options.seed < 2**64:
        raise ValueError(f"--seed: expected an integer of 64 bits, got {options.seed}")
    images = [load_image(path) for path in options.images]
    device = choose_device(options.device or default_device())
    started = time.perf_counter()
    checkpoint = find_checkpoint(options)
    model = PaliGemma.from_pretrained(
        checkpoint, dtype=dtype_named(options.dtype), device=device, quantize=options.quantize
    )
    processor = open_processor(checkpoint, model.config, options)
    inputs = processor([images], [options.prompt]).to(device)
    kind = f" as {options.quantize}" if options.quantize else ""
    note(f"loaded {checkpoint}{kind} on {device} in {time.perf_counter() - started:.1f} s")

    decoder, arrivals = processor.stream_decoder(), [time.perf_counter()]

    def arrive(token: Tensor) -> None:
        text = decoder.push(int(token[0]))
        arrivals.append(time.perf_counter())
        if options.stream:
            print(text, end="", flush=True)

    ids, scores = model.generate(
        **inputs,
        return_scores=True,
        grammar=None if options.constrain is None else processor.grammar(options.constrain),
        stop=processor.stop_at(*options.stop) if options.stop else None,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        num_beams=options.num_beams,
        generator=torch.Generator(device).manual_seed(options.seed) if options.temperature > 0 else None,
        stream=arrive if options.num_beams == 1 else None,
    )
    seconds = time.perf_counter() - arrivals[0]
    text = processor.decode(ids)[0]
    objects = processor.parse_answer(ids[0], images[-1].size, scores[0])
    if options.stream:
        print(decoder.finish())
    elif options.json:
        print(json.dumps(_as_json(text, objects, ids.shape[1], seconds), ensure_ascii=False))
    else:
        print(text)
    if not options.json:
        for found in objects:
            x1, y1, x2, y2 = (round(edge) for edge in found.box)
            mask = "" if found.mask is None else f", mask of {int(found.mask.sum())} pixels"
            print(f"  {found.label or 'object'}: x {x1}–{x2}, y {y1}–{y2}{mask}")
    if options.draw is not None:
        with temporary_sibling(options.draw) as temporary:
            processor.draw(images[-1], objects).save(temporary)
            os.replace(temporary, options.draw)
        note(f"wrote {options.draw}")
    note(_speed(arrivals, ids.shape[1], seconds))


def _as_json(text: str, objects: Sequence[Detection], tokens: int, seconds: float) -> dict[str, object]:
    from ..locations import run_lengths

    listed = [
        {
            "label": found.label,
            "box": [round(edge, 2) for edge in found.box],
            "score": None if found.score is None else round(found.score, 6),
            "mask_pixels": None if found.mask is None else int(found.mask.sum()),
            "mask": None if found.mask is None else run_lengths(found.mask),
        }
        for found in objects
    ]
    return {"text": text, "objects": listed, "tokens": tokens, "seconds": round(seconds, 4)}


def _speed(arrivals: Sequence[float], tokens: int, seconds: float) -> str:
    if len(arrivals) < 2:
        return f"{tokens} tokens in {seconds:.2f} s"
    first = f"first token after {arrivals[1] - arrivals[0]:.2f} s"
    if len(arrivals) < 3:
        return first
    return f"{first}, then {(len(arrivals) - 2) / (arrivals[-1] - arrivals[1]):.1f} tokens/s"
