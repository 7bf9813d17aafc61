"""Teach the int8 built-in model the names of unseen objects: LoRA on a few drawings, on a CPU, in seconds.

python examples/lora_int8.py [--steps N] [--save FOLDER]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from torch import Tensor

from pg_kernels.integrations.peft import register
from pg_kernels.model import EMBEDDED_CHECKPOINT, PaliGemma, Processor

SIDE = 224
PROMPT = "caption en"
ANSWERS = ["red ball", "red book", "blue ball", "blue book"]


def drawing(answer: str, rng: random.Random) -> Image.Image:
    """Draw a disc for a ball or a square for a book, somewhere on white."""
    color, thing = answer.split()
    image = Image.new("RGB", (SIDE, SIDE), "white")
    side = rng.randrange(100, 160)
    left, top = rng.randrange(SIDE - side), rng.randrange(SIDE - side)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if thing == "ball" else draw.rectangle)((left, top, left + side, top + side), fill=color)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save", type=Path, help="a folder for the adapter")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)

    processor = Processor.from_pretrained(EMBEDDED_CHECKPOINT)
    model = PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32, quantize="int8")
    # Only the decoder's layers. transformers' PaliGemma has the same names.
    config = LoraConfig(r=8, lora_alpha=16, target_modules=r".*language_model.*_proj")
    adapted = get_peft_model(model, register(config))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, arguments.steps)

    def pairs() -> dict[str, Tensor]:
        images = [drawing(answer, rng) for answer in ANSWERS]
        return processor(images, [PROMPT] * len(ANSWERS), suffixes=ANSWERS)

    held_out = pairs()
    questions = processor([drawing(answer, rng) for answer in ANSWERS], [PROMPT] * len(ANSWERS))

    @torch.no_grad()
    def report(when: str) -> None:
        adapted.eval()
        texts = processor.decode(adapted.generate(**questions, max_new_tokens=8))
        print(f"{when}: loss {adapted(**held_out).loss:.3f} on held-out drawings; answers: {', '.join(texts)}")

    print(
        f"training {sum(p.numel() for p in trained):,} fp32 parameters over int8 layers; wanted: {', '.join(ANSWERS)}"
    )
    report("before")
    adapted.train()
    for _ in range(arguments.steps):
        loss = adapted(**pairs()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    report("after")
    if arguments.save is not None:
        adapted.save_pretrained(arguments.save)  # transformers' PaliGemma can load it, too


if __name__ == "__main__":
    main()
