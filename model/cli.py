"""The command line: `pg-kernels run`, `demo`, `finetune`, `evaluate`, `compare`, `bench`, `tune`, `info` and `convert`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

import pg_kernels
from pg_kernels.backends import explain
from pg_kernels.ops._common.extension import instruction_sets, unavailable_reason
from pg_kernels.quantization import ACTIVATIONS

from . import EMBEDDED_CHECKPOINT
from .checkpoints.conversion import convert
from .config import PaliGemmaConfig
from .evaluation.command import add_arguments as evaluation_arguments
from .evaluation.command import tasks_in_lines
from .evaluation.run import Predictions, ask, last_written, prepare
from .evaluation.run import table as score_table
from .files import temporary_sibling
from .locations import Detection
from .paligemma import PaliGemma
from .processor import RESIZE_MODES, Processor, load_image
from .quality import compare, table
from .segmentation import MaskVQVAE
from .tokenizer import Tokenizer
from .training import parallel
from .training.data import JsonLines, UnreadableImage
from .training.finetune import Lora, finetune
from .training.interruption import Interrupted
from .training.lock import exclusive
from .training.options import add_recipe_options, recipe_from
from .training.state import CHECKPOINT

if TYPE_CHECKING:
    from .training.evaluation import Score

_COMPARED = (("caption", "en"), ("vqa", "en"), ("detect", ""))
"""What the built-in model is scored on, as it is and quantised."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code: 0 done, 1 failed (said on stderr), 130 interrupted, 143 terminated.

    Usage errors exit with 2.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parser().parse_args(words, argparse.Namespace(words=words))
        options.command(options)
        sys.stdout.flush()  # here, so that a pipe the reader has closed is found out while it can be handled
    except Interrupted as interruption:
        return 128 + interruption.signum
    except KeyboardInterrupt:
        print("pg-kernels: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe; pointing stdout elsewhere keeps the interpreter from failing again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        print(f"pg-kernels: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pg-kernels", description="Run PaliGemma on fast kernels.")
    parser.add_argument("--version", action="version", version=f"pg_kernels {pg_kernels.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="answer a prompt about an image",
        description="Answer a prompt about one or several images. The answer goes to stdout, progress to stderr.",
        epilog="Prompts the released models know: 'caption en', 'ocr', 'answer en QUESTION', 'detect THING ; THING', "
        "'segment THING'. The built-in model knows them all in its world of emoji, words and charts.",
    )
    run.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="image file; several make one prompt's images"
    )
    run.add_argument("prompt", metavar="PROMPT", help="what to ask, e.g. 'caption en' or 'detect cat'")
    _add_model_arguments(run)
    run.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: %(default)s)"
    )
    run.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy; above it, draw (default: 0)"
    )
    run.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    run.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that reach probability P")
    run.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search with N beams")
    run.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    run.add_argument("--stream", action="store_true", help="print the answer as it comes")
    run.add_argument(
        "--draw", type=Path, metavar="FILE", help="write the image with the answer's boxes and masks drawn"
    )
    run.add_argument("--json", action="store_true", help="print one JSON object: text, objects, tokens, seconds")
    run.set_defaults(command=_run)

    showing = commands.add_parser(
        "demo",
        help="let the built-in model do every task, and draw the answers",
        description="Ask the small model that comes with the package about its sample pictures, one for each task: captions, "
        "questions, counting, reading, charts, boxes, masks, and comparing two pictures.",
    )
    showing.add_argument("--draw", type=Path, metavar="FILE", help="write a sheet of pictures with the answers")
    showing.set_defaults(command=_demo)

    tuning = commands.add_parser(
        "finetune",
        help="train a model on JSON lines of image, prefix and suffix",
        description='Train a model, or a LoRA adapter, on JSON lines such as {"image": "a.png", "prefix": "answer en what is '
        'this?", "suffix": "a key"}. A run that was cut off goes on when the same command is given again. Under `torchrun '
        "--nproc-per-node N --no-python` the model is sharded over N processes.",
        epilog="`suffix` may be a list of accepted answers, of which the first is learnt; `image` a list of images, or absent.",
    )
    files = tuning.add_argument_group("files")
    files.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines to learn")
    files.add_argument(
        "--eval-data", type=Path, metavar="FILE", help="JSON lines to evaluate on: loss and exact matches"
    )
    files.add_argument("--images", type=Path, metavar="FOLDER", help="of the images (default: each file's own)")
    files.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out examples with an image that cannot be read, and count them",
    )
    files.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the result and log.jsonl go")
    files.add_argument("--restart", action="store_true", help="replace what --output holds instead of going on with it")
    files.add_argument("--tensorboard", action="store_true", help="write TensorBoard's files to --output, too")
    which = tuning.add_argument_group("model")
    which.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="Hugging Face folder or big_vision .npz (default: the small model that comes with the package)",
    )
    which.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model, for a .npz checkpoint")
    which.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="resample the position embedding for another image size"
    )
    which.add_argument(
        "--resize", choices=RESIZE_MODES, default="hf", help="how images become squares (default: %(default)s)"
    )
    which.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    adapter = tuning.add_argument_group("LoRA")
    adapter.add_argument("--lora", type=int, metavar="RANK", help="train an adapter of this rank, nothing else")
    adapter.add_argument(
        "--lora-alpha", type=int, metavar="N", help="its scale, over the rank (default: twice the rank)"
    )
    adapter.add_argument(
        "--lora-dropout", type=float, default=0.0, metavar="X", help="on its input (default: %(default)s)"
    )
    adapter.add_argument(
        "--lora-targets",
        default=Lora.targets,
        metavar="REGEX",
        help="layers it adapts, by their names in the model (default: %(default)s)",
    )
    adapter.add_argument(
        "--quantize", choices=ACTIVATIONS, help="train it over frozen int8 layers: a half of the memory"
    )
    adapter.add_argument(
        "--merge", action="store_true", help="write the model it makes of the float checkpoint instead"
    )
    own = {
        "epochs": "15, without --steps",
        "learning_rate": "1e-5, with --lora 2e-4",
        "precision": "bfloat16 on CUDA, float32 on CPUs",
    }
    add_recipe_options(tuning, own)
    tuning.set_defaults(command=_finetune, mask_decoder=None)

    evaluation = commands.add_parser(
        "evaluate",
        help="score a model on a task with the task's standard metric",
        description="Ask a model all the questions of a data set, in the data set's own file format, and score its answers\n"
        "with the task's standard metric. Scores go to stdout, times 100; progress goes to stderr.",
        epilog=tasks_in_lines(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluation_arguments(evaluation)
    _add_model_arguments(evaluation)
    evaluation.set_defaults(command=_evaluate)

    comparison = commands.add_parser(
        "compare",
        help="what int8 costs: a quantised model beside its original",
        description="Compare a quantised model with its original: the relative error of every layer, how far the next token's "
        "distribution moves, how many answers stay the same. The built-in model is also scored on fresh pictures of "
        "emoji, for which Debian's fonts-noto-color-emoji and the extras train and evaluate must be there; other checkpoints "
        "need pictures.",
    )
    comparison.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE", help="picture to ask about; several are several prompts"
    )
    comparison.add_argument(
        "--prompt", default="caption en", help="what to ask about each IMAGE (default: %(default)s)"
    )
    comparison.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="folder of the original (default: the built-in model)"
    )
    comparison.add_argument(
        "--quantize", choices=ACTIVATIONS, default="int8", help="how to quantise it (default: %(default)s)"
    )
    comparison.add_argument("--pictures", type=int, default=200, metavar="N", help="fresh ones (default: %(default)s)")
    comparison.add_argument("--seed", type=int, default=1, help="of the fresh pictures (default: %(default)s)")
    comparison.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    comparison.add_argument("--dtype", choices=DTYPES, help="of the original (default: the checkpoint's)")
    comparison.add_argument("--json", action="store_true", help="print one JSON object")
    comparison.set_defaults(command=_compare)

    bench = commands.add_parser(
        "bench",
        help="time the ops beside plain PyTorch and what else is installed",
        description="Time ops on this machine, beside plain PyTorch, torch.compile and the other packages that are installed. "
        "Results whose values are wrong are said to be wrong. Nothing is stored.",
    )
    bench.add_argument(
        "ops", nargs="*", metavar="OP", help="e.g. rms_norm, or a whole model's decode_step (default: all but those)"
    )
    bench.add_argument("--full", action="store_true", help="all shapes instead of the model's usual ones; takes long")
    bench.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    bench.set_defaults(command=_bench)

    tune = commands.add_parser(
        "tune",
        help="find this GPU's fastest tile sizes",
        description="Time the tile sizes that each Triton kernel may use, at the models' shapes, on this GPU, and keep those "
        "that beat the usual ones: every later process uses them. Run it on an otherwise idle GPU.",
    )
    tune.add_argument("ops", nargs="*", metavar="OP", help="e.g. geglu_mlp (default: all that have a choice)")
    tune.add_argument("--device", default="cuda", help="cuda, cuda:1, … (default: %(default)s)")
    tune.set_defaults(command=_tune)

    info = commands.add_parser("info", help="versions, devices, and the backend each op uses and why")
    info.set_defaults(command=_info)

    conversion = commands.add_parser("convert", help="convert a checkpoint between Hugging Face and big_vision")
    conversion.add_argument("source", type=Path, metavar="IN", help="Hugging Face folder or big_vision .npz")
    conversion.add_argument("target", type=Path, metavar="OUT", help="folder to write, or a file ending in .npz")
    conversion.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: the source's)")
    conversion.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model to put into the folder")
    conversion.set_defaults(command=_convert)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, how it is loaded, and how it sees images."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="Hugging Face folder or big_vision .npz (default: the small model that comes with the package)",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model, for a .npz checkpoint")
    parser.add_argument(
        "--mask-decoder",
        type=Path,
        metavar="FILE",
        help="vae-oid.npz or its safetensors conversion: turns segmentation codes into masks",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the checkpoint's)")
    parser.add_argument(
        "--quantize",
        choices=ACTIVATIONS,
        help="int8 weights, a half of bfloat16's memory and on CPUs much faster; int8-dynamic also rounds activations to "
        "int8: a faster first token, answers a little less exact (default: as the checkpoint is)",
    )
    parser.add_argument(
        "--resize", choices=RESIZE_MODES, default="hf", help="how images become squares (default: %(default)s)"
    )


def _run(options: argparse.Namespace) -> None:
    if options.stream and (options.json or options.num_beams > 1):
        raise ValueError("--stream prints text as it comes: it goes with neither --json nor --num-beams")
    if options.draw is not None:
        _check_drawing(options.draw, len(options.images))
    if not -(2**63) <= options.seed < 2**64:
        raise ValueError(f"--seed: expected an integer of 64 bits, got {options.seed}")
    images = [load_image(path) for path in options.images]
    device = _device(options.device or _default_device())
    started = time.perf_counter()
    checkpoint = options.checkpoint or EMBEDDED_CHECKPOINT
    model = PaliGemma.from_pretrained(
        checkpoint, dtype=DTYPES.get(options.dtype), device=device, quantize=options.quantize
    )
    processor = _processor(checkpoint, model.config, options)
    inputs = processor([images], [options.prompt]).to(device)
    kind = f" as {options.quantize}" if options.quantize else ""
    _note(f"loaded {checkpoint}{kind} on {device} in {time.perf_counter() - started:.1f} s")

    decoder, arrivals = processor.stream_decoder(), [time.perf_counter()]

    def arrive(token: torch.Tensor) -> None:
        text = decoder.push(int(token[0]))
        arrivals.append(time.perf_counter())
        if options.stream:
            print(text, end="", flush=True)

    ids = model.generate(
        **inputs,
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
    objects = processor.parse(text, size=images[-1].size)
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
        _note(f"wrote {options.draw}")
    _note(_speed(arrivals, ids.shape[1], seconds))


def _demo(options: argparse.Namespace) -> None:
    from .demo import answers, samples, sheet

    if options.draw is not None:
        _check_drawing(options.draw, 1)
    examples = samples()
    processor = Processor.from_pretrained(EMBEDDED_CHECKPOINT)
    started = time.perf_counter()
    texts = answers(PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT), processor, examples)
    for example, text in zip(examples, texts, strict=True):
        print(f"{' + '.join(path.name for path in example.images)}, {example.prefix!r}: {text!r}")
    _note(f"{len(examples)} answers in {time.perf_counter() - started:.1f} s")
    if options.draw is not None:
        with temporary_sibling(options.draw) as temporary:
            sheet(processor, examples, texts).save(temporary)
            os.replace(temporary, options.draw)
        _note(f"wrote {options.draw}")


def _finetune(options: argparse.Namespace) -> None:
    adapting = options.lora_alpha or options.lora_dropout or options.lora_targets != Lora.targets
    if options.lora is None and (options.quantize or options.merge or adapting):
        raise ValueError("--quantize, --merge and the options of an adapter go with --lora")
    device = _device(options.device or _default_device())
    recipe = recipe_from(
        options,
        epochs=None if options.steps is not None else 15.0,
        learning_rate=1e-5 if options.lora is None else 2e-4,
        precision="bfloat16" if device.type == "cuda" else "float32",
    )
    lora = None
    if options.lora is not None:
        lora = Lora(options.lora, options.lora_alpha, options.lora_dropout, options.lora_targets)
    checkpoint = options.checkpoint or EMBEDDED_CHECKPOINT
    # Masters in fp32 are made of the checkpoint's own numbers.
    dtype = torch.float32 if recipe.precision == "float32" else None

    def read_lines(path: Path) -> JsonLines:
        return JsonLines(path, options.images, skip_unreadable=options.skip_unreadable)

    def read(quantize: str | None, device: torch.device | str) -> PaliGemma:
        return PaliGemma.from_pretrained(
            checkpoint, dtype=dtype, device=device, image_size=options.image_size, quantize=quantize
        )

    device = parallel.start(device)
    try:
        with exclusive(options.output):
            data = read_lines(options.data)
            eval_data = None if options.eval_data is None else read_lines(options.eval_data)
            model = read(options.quantize, device)
            processor = _processor(checkpoint, model.config, options)
            processor.image_size = model.config.vision_config.image_size
            processor.num_image_tokens = model.config.vision_config.num_image_tokens
            trained = finetune(
                model,
                processor,
                data,
                options.output,
                recipe,
                checkpoint=checkpoint,
                eval_data=eval_data,
                lora=lora,
                merge=(lambda: read(None, "cpu")) if options.merge else None,
                restart=options.restart,
                tensorboard=options.tensorboard,
            )
        if parallel.rank() == 0:
            result = f"wrote {options.output}"
            _note(result if trained else f"{options.output} holds the result of this run already; nothing to do")
    except Interrupted as interruption:
        if parallel.rank() == 0:
            _note(f"pg-kernels: {interruption}; go on with: {_again(options)}")
        raise
    except UnreadableImage as error:
        if not (options.output / CHECKPOINT).exists():
            raise
        raise OSError(f"{error}; mend it or give --skip-unreadable, and go on with: {_again(options)}") from error
    finally:
        parallel.stop()


def _again(options: argparse.Namespace) -> str:
    """The command that goes on with an interrupted run. A short form of --restart is at least --rest."""
    words = [word for word in options.words if not word.startswith("--rest")]
    return ("torchrun … " if parallel.world() > 1 else "") + shlex.join(["pg-kernels", *words])


def _evaluate(options: argparse.Namespace) -> None:
    evaluation = prepare(
        options.task,
        options.data,
        annotations=options.annotations,
        images=options.images,
        language=options.language,
        prompt=options.prompt,
        limit=options.limit,
    )
    checkpoint = options.checkpoint or EMBEDDED_CHECKPOINT
    origin = {"checkpoint": "built-in" if options.checkpoint is None else str(checkpoint.resolve())}
    origin |= {name: getattr(options, name) for name in ("quantize", "dtype", "resize", "num_beams", "max_new_tokens")}
    predictions = None
    if options.output is not None:
        made_with = {**origin, "checkpoint_written": last_written(checkpoint)}
        predictions = Predictions(options.output, evaluation, made_with, options.batch_size)
    device = _device(options.device or _default_device())
    model = PaliGemma.from_pretrained(
        checkpoint, dtype=DTYPES.get(options.dtype), device=device, quantize=options.quantize
    )
    processor = _processor(checkpoint, model.config, options)
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
        print("\n".join(score_table(scores, counts)))


def _compare(options: argparse.Namespace) -> None:
    if bool(options.images) == (options.checkpoint is None):
        raise ValueError("give images with --checkpoint; the built-in model, without it, gets fresh pictures")
    if options.pictures < 1:
        raise ValueError(f"--pictures: expected at least 1, got {options.pictures}")
    device, checkpoint = _device(options.device or _default_device()), options.checkpoint or EMBEDDED_CHECKPOINT
    processor = Processor.from_pretrained(checkpoint)
    tasks, score = [(load_image(path), options.prompt) for path in options.images], None
    if not tasks:
        tasks, score = _fresh_pictures(options, processor)
    original, quantised = (
        PaliGemma.from_pretrained(checkpoint, dtype=DTYPES.get(options.dtype), device=device, quantize=mode)
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
    """Prompts about them for a comparison, and what scores a model on them."""
    from .training import tasks, world
    from .training.evaluation import evaluate, held_out_rng, table_rows

    questions = tasks.Questions(world.World(), processor.mask_decoder)
    rows = {key: draw for key, draw in table_rows(questions, processor.image_size).items() if key in _COMPARED}
    asked = [draw(held_out_rng(options.seed, *key, i)) for key, draw in rows.items() for i in range(options.pictures)]
    return [(example.images[0], example.prefix) for example in asked], partial(
        evaluate, processor=processor, questions=questions, count=options.pictures, seed=options.seed, rows=rows
    )


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _device(name: str) -> torch.device:
    """The device of that name, once a number has been there and back."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason, _, _ = str(error).partition("\n")
        raise ValueError(f"--device {name}: {reason}") from error
    return device


def _processor(checkpoint: Path, config: PaliGemmaConfig, options: argparse.Namespace) -> Processor:
    if checkpoint.is_dir():
        if options.tokenizer is not None:
            raise ValueError(f"--tokenizer is for .npz checkpoints; {checkpoint} is a folder with its own")
        return Processor.from_pretrained(checkpoint, resize=options.resize, mask_decoder=options.mask_decoder)
    if options.tokenizer is None:
        raise ValueError(f"{checkpoint} holds no tokenizer: give one with --tokenizer tokenizer.model")
    return Processor(
        Tokenizer.from_file(options.tokenizer, image_token_id=config.image_token_id),
        image_size=config.vision_config.image_size,
        num_image_tokens=config.vision_config.num_image_tokens,
        image_token_id=config.image_token_id,
        max_position_embeddings=config.text_config.max_position_embeddings,
        resize=options.resize,
        mask_decoder=None if options.mask_decoder is None else MaskVQVAE.from_file(options.mask_decoder),
    )


def _as_json(text: str, objects: Sequence[Detection], tokens: int, seconds: float) -> dict[str, object]:
    found = [
        {
            "label": thing.label,
            "box": [round(edge, 2) for edge in thing.box],
            "mask_pixels": None if thing.mask is None else int(thing.mask.sum()),
        }
        for thing in objects
    ]
    return {"text": text, "objects": found, "tokens": tokens, "seconds": round(seconds, 4)}


def _speed(arrivals: Sequence[float], tokens: int, seconds: float) -> str:
    if len(arrivals) < 2:
        return f"{tokens} tokens in {seconds:.2f} s"
    first = f"first token after {arrivals[1] - arrivals[0]:.2f} s"
    if len(arrivals) < 3:
        return first
    return f"{first}, then {(len(arrivals) - 2) / (arrivals[-1] - arrivals[1]):.1f} tokens/s"


def _check_drawing(path: Path, num_images: int) -> None:
    """Refuse a drawing that could not be written before any work is done."""
    if num_images > 1:
        raise ValueError(f"--draw draws on one image, got {num_images}")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--draw {path}: Pillow writes no format with the ending {path.suffix!r}; .png is a good one")
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise OSError(f"--draw {path}: cannot be written; it must be a file in an existing, writable folder")


def _info(options: argparse.Namespace) -> None:
    print(f"pg_kernels  {pg_kernels.__version__}  {Path(pg_kernels.__file__).parent}")
    print(f"Python      {platform.python_version()} on {platform.platform()}")
    print(f"torch       {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    for package in ("triton", "transformers"):
        print(f"{package:11} {metadata.version(package) if util.find_spec(package) else 'not installed'}")
    print(f"CPU         {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    used, available = instruction_sets()
    choice = "any of them by PG_KERNELS_ISA: " + ", ".join(available)
    print(f"extension   {f'{used} ({choice})' if used else unavailable_reason('cpu')}")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        print(f"cuda:{index}      {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print("cuda        none found")
    for device_type in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        print(f"\nBackend of each op on {device_type}, and why no other:")
        for op, (backend, reasons) in explain(device_type).items():
            print(f"  {op:22} {backend:10} {'; '.join(reasons.values())}")


def _bench(options: argparse.Namespace) -> None:
    from pg_kernels.benchmarks.bench import bench  # only this command needs the suite

    bench(options.ops, _device(options.device or _default_device()), full=options.full)


def _tune(options: argparse.Namespace) -> None:
    from pg_kernels.benchmarks.kernels.tuning import tune

    command = " ".join(["pg-kernels tune", *options.ops])
    _note(f"wrote {tune(options.ops, _device(options.device), command)}")


def _convert(options: argparse.Namespace) -> None:
    if options.tokenizer is not None:
        Tokenizer.from_file(options.tokenizer)  # fails before anything is written
    convert(options.source, options.target, dtype=DTYPES.get(options.dtype), tokenizer=options.tokenizer)
    images = [
        name for name in ("preprocessor_config.json", "processor_config.json") if (options.target / name).is_file()
    ]
    # The files of a source folder are copied as they are; a processor knows only its own fields.
    if (options.target / "tokenizer.model").is_file() and (options.tokenizer is not None or not images):
        Processor.from_pretrained(options.target).save_pretrained(options.target)
    _note(f"wrote {options.target}")


def _note(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
