"""What `patch` changes when training with transformers: a LoRA fine-tune by `Trainer`, and a step over the whole vocabulary."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pg_kernels.benchmarks.measure.machine import device_name, versions
from pg_kernels.benchmarks.measure.timing import peak_bytes, seconds
from pg_kernels.benchmarks.report.plots.style import BASELINE, DPI, OURS, WIDTH
from pg_kernels.benchmarks.report.text import duration, markdown_table, times
from pg_kernels.model import EMBEDDED_CHECKPOINT, Processor
from pg_kernels.model.files import json_bytes, temporary_sibling, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CPU = torch.device("cpu")
PLAIN, PATCHED = "transformers", "patched"
LORA, STEP = "LoRA fine-tune by Trainer", "step over the whole vocabulary"
SAMPLE = EMBEDDED_CHECKPOINT / "samples" / "banana_and_owl.png"
ANSWERS = ("eine banane und eine eule", "una banana y un búho", "una banana e un gufo", "banaani ja pöllö")
STEPS = {LORA: 24, STEP: 4}
VOCABULARY = 257_216
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
"""A small decoder. Beside 256 image tokens and the whole vocabulary, its cost is negligible."""
SUFFIX = 32
_LENGTH = 256 + SUFFIX


@dataclass(frozen=True)
class Seen:
    """Seconds and losses of one run of a task."""

    seconds: float
    losses: list[float]


def run(folder: Path, *, rounds: int, command: str) -> dict[str, Any]:
    """Run both tasks, plain and patched, in random order in each round; store `drop-in.json`, `.md` and `.png`."""
    tasks: Mapping[str, Callable[[bool, int], Seen]] = {LORA: _fine_tune, STEP: _step}
    seen: dict[str, dict[str, list[Seen]]] = {task: {PLAIN: [], PATCHED: []} for task in tasks}
    peaks: dict[str, dict[str, int]] = {task: {} for task in tasks}
    draw = random.Random(0)
    turns = [(task, name) for task in tasks for name in (PLAIN, PATCHED)]
    with tqdm(total=len(turns) * (rounds + 1), desc="drop-in", unit="run", disable=None) as bar:
        for task, name in turns:
            peaks[task][name] = peak_bytes(partial(tasks[task], name == PATCHED, 2), CPU)
            bar.update()
        for _ in range(rounds):
            for task, name in draw.sample(turns, len(turns)):
                seen[task][name].append(tasks[task](name == PATCHED, STEPS[task]))
                gc.collect()
                bar.update()
    content = {
        "device": device_name(CPU),
        "versions": versions(),
        "command": command,
        "logits_bytes": 4 * 2 * _LENGTH * VOCABULARY,
        "peaks": peaks,
        "seen": {
            task: {name: [asdict(one) for one in found] for name, found in both.items()} for task, both in seen.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "drop-in.json", json_bytes(content))
    write_atomically(folder / "drop-in.md", (markdown(content) + "\n").encode())
    with temporary_sibling(folder / "drop-in.png") as temporary:
        _losses(content).savefig(temporary, dpi=DPI)
        os.replace(temporary, folder / "drop-in.png")
    return content


def markdown(content: Mapping[str, Any]) -> str:
    """Return a table of the stored runs: median times, peak memory, and how far the losses of both differ."""
    lines = []
    for task, both in content["seen"].items():
        middle = {name: median(one["seconds"] for one in found) for name, found in both.items()}
        apart = max(
            abs(ours - theirs) / abs(theirs)
            for plain, patched in zip(both[PLAIN], both[PATCHED], strict=True)
            for theirs, ours in zip(plain["losses"], patched["losses"], strict=True)
        )
        for name in both:
            peak = content["peaks"][task][name]
            ours = name == PATCHED
            saved = content["peaks"][task][PLAIN] - peak
            lines.append(
                (
                    task,
                    name,
                    duration(middle[name]),
                    times(middle[PLAIN] / middle[name]) if ours else "",
                    f"{peak / 1e6:,.0f} MB",
                    f"{saved / 1e6:,.0f} MB" if ours else "",
                    f"{apart:.1e}" if ours else "",
                )
            )
    header = ("task", "", "time", "speed-up", "memory at most", "less by", "losses apart, relative")
    count = len(next(iter(content["seen"].values()))[PLAIN])
    rounds = f"{count} round{'s' * (count != 1)}"
    steps = " and ".join(f"{len(both[PLAIN][0]['losses'])} steps" for both in content["seen"].values())
    return "\n\n".join(
        (
            f"On {content['device']} ({', '.join(f'{name} {version}' for name, version in content['versions'].items())}); "
            f"`{content['command']}`; medians of {rounds} in random order, of {steps}. Memory is what one run "
            f"takes beyond what was there before it, weights included. Logits of the vocabulary's step are "
            f"{content['logits_bytes'] / 1e6:,.0f} MB in fp32.",
            markdown_table(header, lines),
            "![Losses of both](drop-in.png)",
        )
    )


def _losses(content: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, 4.0), layout="constrained")
    for axes, (task, both) in zip(figure.subplots(1, 2), content["seen"].items(), strict=True):
        for name, color, width in ((PLAIN, BASELINE, 5.0), (PATCHED, OURS[0], 1.5)):
            losses = both[name][0]["losses"]
            axes.plot(range(1, len(losses) + 1), losses, color=color, linewidth=width, label=name)
        axes.set(title=task, xlabel="step", ylabel="loss, nats a token")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


# --- a LoRA fine-tune of the built-in model


def _fine_tune(patched: bool, steps: int) -> Seen:
    from peft import LoraConfig, get_peft_model
    from transformers import PaliGemmaForConditionalGeneration, Trainer, TrainingArguments

    from pg_kernels.integrations.transformers import patch

    torch.manual_seed(0)
    model: Any = PaliGemmaForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)
    adapted: Any = get_peft_model(model, LoraConfig(r=8, target_modules=r".*language_model.*_proj"))
    if patched:
        patch(adapted)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            max_steps=steps,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        collate = partial(_collated, Processor.from_pretrained(EMBEDDED_CHECKPOINT))
        trainer = Trainer(model=adapted, args=arguments, train_dataset=_examples(), data_collator=collate)
        trainer.pop_callback(_printer())
        took = seconds(trainer.train, CPU)
    return Seen(took, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def _printer() -> Any:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def _examples() -> list[tuple[Image.Image, str]]:
    """Return the sample picture in all orientations, each with its caption in four languages."""
    picture = Image.open(SAMPLE).convert("RGB")
    turns = [None, *Image.Transpose]
    return [(picture if t is None else picture.transpose(t), a) for t in turns for a in ANSWERS]


def _collated(processor: Processor, examples: Sequence[tuple[Image.Image, str]]) -> dict[str, Tensor]:
    images, answers = zip(*examples, strict=True)
    return processor(list(images), ["caption"] * len(images), suffixes=list(answers))


# --- full fine-tuning over 257,216 tokens


def _step(patched: bool, steps: int) -> Seen:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    from pg_kernels.integrations.transformers import patch

    torch.manual_seed(0)
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 144,
        "intermediate_size": 288,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 224,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = {"model_type": "gemma", "vocab_size": VOCABULARY, **SMALL}
    width = SMALL["hidden_size"]
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=width, image_token_index=VOCABULARY - 1
    )
    model: Any = PaliGemmaForConditionalGeneration(config).train()
    if patched:
        patch(model)
    words = torch.randint(VOCABULARY - 1, (2, SUFFIX))
    ids = torch.cat((torch.full((2, 256), VOCABULARY - 1), words), 1)
    suffix = (torch.arange(_LENGTH) >= 256).expand(2, -1)
    batch = {
        "input_ids": ids,
        "pixel_values": torch.rand(2, 3, 224, 224) * 2 - 1,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": suffix.long(),
        "labels": ids.where(suffix, -100),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []

    def train() -> None:
        for _ in range(steps):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

    return Seen(seconds(train, CPU), losses)
