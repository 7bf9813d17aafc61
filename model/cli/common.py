"""What several commands share: arguments, devices, processors, checks and notes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from PIL import Image

from pg_kernels.quantization import ACTIVATIONS

from ..config import PaliGemmaConfig
from ..images import RESIZE_MODES
from ..processor import Processor
from ..segmentation import MaskVQVAE
from ..tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose a model, its dtype and device, and how images are resized."""
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


def default_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_device(name: str) -> torch.device:
    """Return the device of that name after a test transfer. Raises ValueError if the device does not work."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason, _, _ = str(error).partition("\n")
        raise ValueError(f"--device {name}: {reason}") from error
    return device


def open_processor(checkpoint: Path, config: PaliGemmaConfig, options: argparse.Namespace) -> Processor:
    """Open the processor of a checkpoint: a folder's own, or one with `--tokenizer` for an .npz file."""
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
    if num_images > 1:
        raise ValueError(f"--draw draws on one image, got {num_images}")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--draw {path}: Pillow writes no format with the ending {path.suffix!r}; .png is a good one")
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise OSError(f"--draw {path}: cannot be written; it must be a file in an existing, writable folder")


def note(text: str) -> None:
    """Print to stderr."""
    print(text, file=sys.stderr)
