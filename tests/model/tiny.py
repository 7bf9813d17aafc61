"""A tiny random checkpoint to fine-tune, and pictures of one colour with questions about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pg_kernels.model import EMBEDDED_CHECKPOINT, PaliGemma, PaliGemmaConfig, Processor, TextConfig, VisionConfig
from pg_kernels.model.tokenizer import Tokenizer

COLOURS = ("red", "blue", "white")
FAST = ("--workers", 0, "--learning-rate", 1e-2, "--batch-size", 6, "--warmup", 0.1)


def write_checkpoint(folder: Path) -> Path:
    tokenizer = Tokenizer.from_pretrained(EMBEDDED_CHECKPOINT)
    torch.manual_seed(0)
    config = PaliGemmaConfig(
        vision_config=VisionConfig(32, 48, 1, 2, image_size=28),
        text_config=TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=64,
        ),
        image_token_id=tokenizer.image_token_id,
    )
    PaliGemma(config).save_pretrained(folder)
    Processor(tokenizer, image_size=28, num_image_tokens=4).save_pretrained(folder)
    return folder


def make_answer(model: PaliGemma, tokenizer: Tokenizer, answer: str) -> None:
    """Set an untied model's weights so that each token determines the next: after a prompt come the answer and the end."""
    chain = [*tokenizer.encode("\n"), *tokenizer.encode(answer), tokenizer.eos_id]
    assert len(set(chain)) == len(chain)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
        model.lm_head.weight[chain[1:]] = model.model.language_model.embed_tokens.weight[chain[:-1]]


def write_data(folder: Path) -> Path:
    """Write two lines for each colour's picture."""
    for colour in COLOURS:
        Image.new("RGB", (10, 10), colour).save(folder / f"{colour}.png")
    lines = [
        {"image": f"{colour}.png", "prefix": prefix, "suffix": [colour, colour.title()]}
        for colour in COLOURS
        for prefix in ("what", "which")
    ]
    return write_lines(folder / "data.jsonl", lines)


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path
