"""Prefill and decoding on llama.cpp: only the decoder, causal, on as many text tokens as the prompt has with its image."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from pg_kernels.benchmarks.cases.catalogue import ANSWER
from pg_kernels.benchmarks.cases.models import num_text_ids
from pg_kernels.benchmarks.cases.ops import Inputs
from pg_kernels.benchmarks.measure.timing import Candidate, TimedCall
from pg_kernels.model import PaliGemma


@contextmanager
def _gguf(model: PaliGemma) -> Any:
    from pg_kernels.benchmarks.contenders.llama_cpp import write_gguf

    with TemporaryDirectory() as folder:
        path = Path(folder) / "decoder.gguf"
        write_gguf(model, path)
        yield path


def _decoder(inputs: Inputs) -> Any:
    from pg_kernels.benchmarks.contenders.llama_cpp import LlamaDecoder

    if len(inputs["input_ids"]) > 1:
        raise ValueError("compared at batch 1")
    with _gguf(inputs["model"]) as path:  # the file is mapped into memory and may be removed
        length = inputs["input_ids"].shape[1] + ANSWER
        on_gpu = inputs["input_ids"].device.type == "cuda"
        return LlamaDecoder(path, threads=torch.get_num_threads(), context=length, gpu=on_gpu)


def text_ids(inputs: Inputs) -> list[int]:
    """Return as many text ids as the prompt has with its image."""
    ids = inputs["input_ids"][0]
    return (torch.arange(len(ids)) * 97 % num_text_ids(inputs["model"].config)).tolist()


def prefill(inputs: Inputs) -> Candidate:
    decoder, ids = _decoder(inputs), text_ids(inputs)

    def run(_: Any) -> Tensor:
        decoder.prefill(ids)
        return decoder.logits()[None]

    return Candidate(TimedCall(run), lambda: [run(None)])


def decode_step(inputs: Inputs) -> Candidate:
    decoder, ids = _decoder(inputs), text_ids(inputs)
    decoder.prefill(ids)
    token = int(inputs["suffix"][0, 0])

    def run(_: Any) -> Tensor:
        decoder.decode(token)
        return decoder.logits()[None]

    def rewind() -> None:
        decoder.rewind(len(ids))

    def results() -> list[Tensor]:
        rewind()
        return [run(None)]

    return Candidate(TimedCall(run, rewind), results)
