"""`pg-kernels finetune`: train a model, or an adapter, on JSON lines."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from pg_kernels.modes import ACTIVATIONS

from ..choices import RESIZE_MODES
from ..training.interruption import Interrupted
from ..training.options import add_recipe_options, recipe_from
from ..training.recipe import Lora
from .common import add_checkpoint_arguments, choose_device, default_device, find_checkpoint, note, open_processor


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "finetune",
        help="train a model on JSON lines of image, prefix and suffix",
        description='Train a model, or a LoRA adapter, on JSON lines such as {"image": "a.png", "prefix": "answer en what is '
        'this?", "suffix": "a key"}. A run that was cut off goes on when the same command is given again. Under `torchrun '
        "--nproc-per-node N --no-python` the model is sharded over N processes.",
        epilog="`suffix` may be a list of accepted answers, of which the first is learnt; `image` a list of images, or absent.",
    )
    files = parser.add_argument_group("files")
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
    which = parser.add_argument_group("model")
    add_checkpoint_arguments(which)
    which.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model, for a .npz checkpoint")
    which.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="resample the position embedding for another image size"
    )
    which.add_argument(
        "--resize", choices=RESIZE_MODES, default="hf", help="how images become squares (default: %(default)s)"
    )
    which.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    adapter = parser.add_argument_group("LoRA")
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
    add_recipe_options(parser, own)
    parser.set_defaults(command=run, mask_decoder=None)


def run(options: argparse.Namespace) -> None:
    import torch

    from ..paligemma import PaliGemma
    from ..training import parallel
    from ..training.data import JsonLines, UnreadableImage
    from ..training.finetune import finetune
    from ..training.lock import exclusive
    from ..training.state import CHECKPOINT

    adapting = options.lora_alpha or options.lora_dropout or options.lora_targets != Lora.targets
    if options.lora is None and (options.quantize or options.merge or adapting):
        raise ValueError("--quantize, --merge and the options of an adapter go with --lora")
    device = choose_device(options.device or default_device())
    recipe = recipe_from(
        options,
        epochs=None if options.steps is not None else 15.0,
        learning_rate=1e-5 if options.lora is None else 2e-4,
        precision="bfloat16" if device.type == "cuda" else "float32",
    )
    lora = None
    if options.lora is not None:
        lora = Lora(options.lora, options.lora_alpha, options.lora_dropout, options.lora_targets)
    checkpoint = find_checkpoint(options)
    # fp32 master weights keep the checkpoint's own values.
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
            processor = open_processor(checkpoint, model.config, options)
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
            note(result if trained else f"{options.output} holds the result of this run already; nothing to do")
    except Interrupted as interruption:
        if parallel.rank() == 0:
            note(f"pg-kernels: {interruption}; go on with: {_resume_command(options)}")
        raise
    except UnreadableImage as error:
        if not (options.output / CHECKPOINT).exists():
            raise
        raise OSError(
            f"{error}; mend it or give --skip-unreadable, and go on with: {_resume_command(options)}"
        ) from error
    finally:
        parallel.stop()


def _resume_command(options: argparse.Namespace) -> str:
    """Return the command that resumes an interrupted run. The shortest form of --restart that argparse accepts is --rest."""
    from ..training import parallel

    words = [word for word in options.words if not word.startswith("--rest")]
    return ("torchrun … " if parallel.world() > 1 else "") + shlex.join(["pg-kernels", *words])
