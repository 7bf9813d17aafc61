"""Arguments, devices, processors, checks and notes of several commands.

The modules of the command line import torch inside functions, so that help texts and usage errors appear at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pg_kernels.modes import ACTIVATIONS

from .. import EMBEDDED_CHECKPOINT
from ..choices import DTYPES, RESIZE_MODES

if TYPE_CHECKING:
    import torch

    from ..config import PaliGemmaConfig
    from ..processor import Processor


def add_checkpoint_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the arguments that choose a checkpoint."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="Hugging Face folder, name on the hub such as google/paligemma2-3b-mix-224, or big_vision .npz (default: the "
        "small model that comes with the package)",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a checkpoint on the hub")


def find_checkpoint(options: argparse.Namespace) -> Path:
    """Return the path of `--checkpoint`, downloaded if it is a name on the hub, or of the built-in model."""
    if options.checkpoint is None:
        return EMBEDDED_CHECKPOINT
    from ..checkpoints.hub import local_path

    return local_path(options.checkpoint, weights=True, revision=options.revision)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose a model, its dtype and device, and how images are resized."""
    add_checkpoint_arguments(parser)
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


def default_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_named(name: str | None) -> torch.dtype | None:
    """Return the dtype of that name, or None for None."""
    import torch

    return None if name is None else getattr(torch, name)


def choose_device(name: str) -> torch.device:
    """Return the device of that name after a test transfer. Raises ValueError if the device does not work."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason, _, _ = str(error).partition("\n")
        raise ValueError(f"--device {name}: {reason}") from error
    return device


def open_processor(checkpoint: Path, config: PaliGemmaConfig, options: argparse.Namespace) -> Processor:
    """Open the processor of a checkpoint: a folder's own, or one with `--tokenizer` for an .npz file."""
    from ..processor import Processor
    from ..segmentation import MaskVQVAE
    from ..tokenizer import Tokenizer

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


def check_drawing(path: Path, num_images: int) -> None:
    """Raise early if the drawing cannot be written."""
    from PIL import Image

    if num_images > 1:
        raise ValueError(f"--draw draws on one image, got {num_images}")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--draw {path}: Pillow writes no format with the ending {path.suffix!r}; .png is a good one")
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise OSError(f"--draw {path}: cannot be written; it must be a file in an existing, writable folder")


def note(text: str) -> None:
    """Print to stderr."""
    print(text, file=sys.stderr)
