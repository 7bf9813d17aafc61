"""Converting a checkpoint without the model in memory."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from ..files import temporary_sibling
from ..paligemma import PaliGemma
from .big_vision import write_big_vision
from .huggingface import write_huggingface
from .layout import COMPANIONS, TensorSpec, check_dtype
from .loading import open_checkpoint, resolve, streamed

# Files that a fine-tuned model keeps, too, and that neither the model nor the processor writes.
_HERITAGE = re.compile(r"chat_template\.(?:json|jinja)|(?:LICENSE|NOTICE)(?:\.(?:md|txt))?")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> None:
    """Convert a Hugging Face folder or a big_vision .npz to a Hugging Face folder, or to .npz if `target` ends in .npz.

    Memory stays at a few tensors, except from .npz to .npz, which takes the whole model. A folder gets the source folder's
    tokenizer and processor files, generation_config.json, mask decoder (vae-oid.npz), chat template and licence.

    Args:
        source, target: folders or .npz files.
        dtype: of the tensors; default: the source's.
        tokenizer: a SentencePiece model, written to the folder as tokenizer.model.
        progress: show a bar on stderr, if it is a terminal.

    Raises what `PaliGemma.from_pretrained` raises for the source; OSError naming the target if it cannot be written;
    FileNotFoundError for a missing tokenizer; ValueError for a tokenizer with an .npz target, and for an output head whose
    values are not the embedding's, which .npz cannot hold.
    """
    check_dtype(dtype)
    source, target = Path(source), Path(target)
    if tokenizer is not None:
        if target.suffix == ".npz":
            raise ValueError(f"tokenizer is given, but {target} is an .npz file, which has no place for it")
        if not Path(tokenizer).is_file():
            raise FileNotFoundError(f"tokenizer {tokenizer} does not exist")
    if target.suffix == ".npz" and not source.is_dir():
        PaliGemma.from_pretrained(source, dtype=dtype, progress=progress).save_big_vision(target)
        return

    reader = open_checkpoint(source)
    if reader.quantization is not None:
        raise ValueError(f"{source} holds int8 weights, which are not converted; convert the original checkpoint")
    config, names = resolve(PaliGemma, reader, None)
    target_dtype, cpu = dtype or reader.dtype, torch.device("cpu")
    if target.suffix == ".npz":
        file_names = {name: file_name for file_name, name in names.items()}
        config = replace(config, tie_word_embeddings=not reader.head_differs())
        write_big_vision(
            config, lambda name: next(reader.tensors([file_names[name]], target_dtype, cpu))[1], target, target_dtype
        )
        return
    specs = [TensorSpec(name, reader.shapes[file_name], target_dtype) for file_name, name in names.items()]
    tensors = ((names[name], tensor) for name, tensor in streamed(reader, names, target_dtype, cpu, progress))
    copied = {path.name: path for path in _files(source) if path.name in COMPANIONS or _HERITAGE.fullmatch(path.name)}
    if tokenizer is not None:
        copied["tokenizer.model"] = Path(tokenizer)
    write_huggingface(config, specs, tensors, target, copied_files=copied)


def copy_heritage(source: Path, folder: Path) -> None:
    """Copy the chat template and the licence of a checkpoint folder into the folder of a model made from it."""
    for path in _files(source):
        if _HERITAGE.fullmatch(path.name):
            with temporary_sibling(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
                os.replace(temporary, folder / path.name)


def _files(source: Path) -> list[Path]:
    return [path for path in source.iterdir() if path.is_file()] if source.is_dir() else []
