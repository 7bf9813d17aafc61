"""A user's session with a whole model, each in a process of its own: load a checkpoint, ask about an image, watch the answer.

The suite times stages of models that are in memory; here loading and the most memory that a process ever takes count, too, and
our sessions say what each part of the model took, beside the least that this machine could.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pg_kernels.model import PaliGemma, PaliGemmaConfig
from pg_kernels.model.checkpoints import save_huggingface
from pg_kernels.model.files import json_bytes, write_atomically
from pg_kernels.model.gemma import GemmaAttention
from pg_kernels.model.paligemma import MultiModalProjector
from pg_kernels.model.siglip import SiglipAttention, SiglipMLP
from pg_kernels.nn import GeGLUMLP, LayerNorm, RMSNorm

from .cases import ANSWER, PROMPT
from .machine import ceilings, device_name, versions
from .models import filled
from .ops import visible_pairs
from .results import Ceilings
from .text import duration, markdown_table

CONTENDERS: dict[str, tuple[str, str | None]] = {
    "pg_kernels int8": ("pg_kernels", "int8"),
    "pg_kernels int8-dynamic": ("pg_kernels", "int8-dynamic"),
    "pg_kernels bfloat16": ("pg_kernels", None),
    "transformers bfloat16": ("transformers", None),
}
"""Package and how it is to quantise, by name."""
BASELINE = "transformers bfloat16"


@dataclass(frozen=True)
class Part:
    """Seconds that a part of the model took, or the least that the machine needs for its bytes and products."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    """Of one token."""


@dataclass(frozen=True)
class Session:
    """What one process saw."""

    load_s: float
    first_token_s: float
    """Of the second prompt: the first one also starts threads and touches memory."""
    tokens_per_s: float
    peak_bytes: int
    """Resident at most, from the start of the process to its end."""
    parts: Mapping[str, Part]


def run(model: str, folder: Path, *, rounds: int, names: list[str], command: str) -> Path:
    """Run all contenders' sessions, in a random order in each of some rounds, and store them as `session.json` and `.md`."""
    config = PaliGemmaConfig.named(model)
    sessions: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with TemporaryDirectory() as checkpoint:
        save_huggingface(filled(config, torch.bfloat16, torch.device("cpu")), checkpoint)
        draw = random.Random(0)
        limits = ceilings(torch.device("cpu"))
        with tqdm(total=rounds * len(names), desc="sessions", unit="process", disable=None) as bar:
            for _ in range(rounds):
                for name in draw.sample(names, len(names)):
                    sessions[name].append(_in_a_process(name, Path(checkpoint)))
                    bar.update()
                # Memory that others share is faster at some times than at others: the ceiling is the best of them.
                limits = _higher(limits, ceilings(torch.device("cpu")))
    content = {
        "model": model,
        "device": device_name(torch.device("cpu")),
        "versions": versions(),
        "command": command,
        "ceilings": asdict(limits),
        "bounds": {
            name: {part: asdict(least) for part, least in bounds(config, CONTENDERS[name][1], limits).items()}
            for name in names
        },
        "sessions": sessions,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "session.json"
    write_atomically(path, json_bytes(content))
    write_atomically(folder / "session.md", (markdown(content) + "\n").encode())
    return path


def markdown(content: Mapping[str, Any]) -> str:
    """Tables of stored sessions: medians over the rounds, over transformers' where that took part, and where our time goes."""
    sessions: Mapping[str, list[dict[str, Any]]] = content["sessions"]

    def middle(name: str, what: str) -> float:
        return median(session[what] for session in sessions[name])

    lines = []
    for name in sessions:
        ratio = {what: "" for what in ("first_token_s", "tokens_per_s")}
        if BASELINE in sessions and name != BASELINE:
            ratio = {what: f" ({middle(name, what) / middle(BASELINE, what):.2f}×)" for what in ratio}
        lines.append(
            (
                name,
                duration(middle(name, "load_s")),
                duration(middle(name, "first_token_s")) + ratio["first_token_s"],
                f"{middle(name, 'tokens_per_s'):.2f}{ratio['tokens_per_s']}",
                f"{max(session['peak_bytes'] for session in sessions[name]) / 1e9:.2f} GB",
            )
        )
    header = ("contender", "load", "first token", "tokens/s", "peak memory")
    blocks = [
        f"{content['model']}, random weights, one image and {PROMPT} tokens of prompt, on {content['device']} "
        f"({', '.join(f'{name} {version}' for name, version in content['versions'].items())}); `{content['command']}`; "
        f"medians of {len(next(iter(sessions.values())))} processes each, in random order:",
        markdown_table(header, lines),
    ]
    for name in sessions:
        if sessions[name][0]["parts"]:
            blocks += [
                f"Where the time of {name} goes, and the least for its bytes and products:",
                _parts(sessions[name], content["bounds"][name]),
            ]
    return "\n\n".join(blocks)


def _parts(sessions: list[dict[str, Any]], bounds: Mapping[str, Mapping[str, float]]) -> str:
    stages = ("prefill_s", "decode_s")
    table: dict[str, list[tuple[float, ...]]] = {
        name: [
            (median(s["parts"][name][stage] for s in sessions), bounds.get(name, {}).get(stage, 0.0))
            for stage in stages
        ]
        for name in sessions[0]["parts"]
    }
    table["sum"] = [tuple(map(sum, zip(*column, strict=True))) for column in zip(*table.values(), strict=True)]
    lines = []
    for name, columns in table.items():
        cells = [name]
        for took, bound in columns:
            cells += [duration(took) if took else "–", duration(bound) if bound else "–"]
            cells.append(f"{bound / took:.0%}" if took and bound else "–")
        lines.append(tuple(cells))
    return markdown_table(("part", "first token", "bound", "reached", "a further token", "bound", "reached"), lines)


def _higher(one: Ceilings, other: Ceilings) -> Ceilings:
    return Ceilings(
        max(one.copy_bytes_per_s, other.copy_bytes_per_s),
        max(one.read_bytes_per_s, other.read_bytes_per_s),
        {name: max(rate, other.flops_per_s[name]) for name, rate in one.flops_per_s.items()},
    )


def _in_a_process(name: str, checkpoint: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, name, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
        )
    return json.loads(done.stdout.splitlines()[-1])


# --- in the process


def session(name: str, checkpoint: Path) -> Session:
    """Load a checkpoint and answer two prompts."""
    package, quantize = CONTENDERS[name]
    start = perf_counter()
    model = _load_ours(checkpoint, quantize) if package == "pg_kernels" else _load_theirs(checkpoint)
    load_s = perf_counter() - start
    inputs = prompts(model.config)
    generate = _our_tokens if package == "pg_kernels" else _their_tokens
    for _ in range(2):
        arrivals = [perf_counter(), *generate(model, inputs)]
    peak = resident_bytes()
    rate = (len(arrivals) - 2) / (arrivals[-1] - arrivals[1])
    parts = _breakdown(model, inputs) if package == "pg_kernels" else {}
    return Session(load_s, arrivals[1] - arrivals[0], rate, peak, parts)


def resident_bytes() -> int:
    """Resident at most since the process became this program: Linux's rusage remembers the one that started it, too."""
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _load_ours(checkpoint: Path, quantize: str | None) -> PaliGemma:
    return PaliGemma.from_pretrained(checkpoint, quantize=quantize)


def _load_theirs(checkpoint: Path) -> Any:
    from transformers import PaliGemmaForConditionalGeneration

    return PaliGemmaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()


def _our_tokens(model: PaliGemma, inputs: Mapping[str, Tensor]) -> list[float]:
    """When each token of an answer came."""
    arrivals: list[float] = []
    options: dict[str, Any] = {"max_new_tokens": ANSWER, "eos_token_id": -1}
    model.generate(**inputs, **options, stream=lambda token: arrivals.append(perf_counter()))
    return arrivals


def _their_tokens(model: Any, inputs: Mapping[str, Tensor]) -> list[float]:
    watch = _Watch()
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False}
    model.generate(**inputs, **options, streamer=watch)
    return watch.arrivals[1:]


class _Watch:
    """What transformers streams to: the prompt first, then every token."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.arrivals.append(perf_counter())

    def end(self) -> None:
        pass


def prompts(config: Any, batch: int = 1) -> dict[str, Tensor]:
    """What `generate` takes, of ours and of transformers' models: each an image and `PROMPT` tokens of text, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    size: int = config.vision_config.image_size
    tokens = (size // config.vision_config.patch_size) ** 2
    text = torch.randint(min(256_000, config.text_config.vocab_size), (batch, PROMPT), generator=generator)
    ids = torch.cat((torch.full((batch, tokens), int(config.image_token_id)), text), 1)
    pixels = torch.rand(batch, 3, size, size, generator=generator).mul_(2).sub_(1).bfloat16()
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }


# --- what the parts take

_KINDS: dict[type[nn.Module], str] = {
    SiglipAttention: "image encoder, attention",
    SiglipMLP: "image encoder, MLP",
    MultiModalProjector: "projector",
    GemmaAttention: "decoder, attention",
    GeGLUMLP: "decoder, MLP",
    RMSNorm: "norms",
    LayerNorm: "norms",
}
_HEAD, _REST = "output head", "embedding, residuals and Python"


def _breakdown(model: PaliGemma, inputs: Mapping[str, Tensor]) -> dict[str, Part]:
    calls: list[tuple[str, float, float]] = []
    with _clocks(model, calls):
        times = [perf_counter(), *_our_tokens(model, inputs)]
    spent: list[dict[str, float]] = []
    for begin, end in pairwise(times):
        parts: dict[str, float] = {}
        for part, start, stop in calls:
            if begin <= start < end:
                parts[part] = parts.get(part, 0.0) + stop - start
        spent.append({**parts, _REST: end - begin - sum(parts.values())})
    return {
        name: Part(spent[0].get(name, 0.0), median(step.get(name, 0.0) for step in spent[1:]))
        for name in [*dict.fromkeys(_KINDS.values()), _HEAD, _REST]
    }


@contextmanager
def _clocks(model: PaliGemma, calls: list[tuple[str, float, float]]) -> Iterator[None]:
    """Note every call of a part: its name, when it began and when it was over."""
    starts: list[float] = []
    hooks = []
    for module in model.modules():
        if type(module) in _KINDS:
            part = _KINDS[type(module)]
            hooks.append(module.register_forward_pre_hook(lambda *_: starts.append(perf_counter())))
            hooks.append(
                module.register_forward_hook(lambda *_, part=part: calls.append((part, starts.pop(), perf_counter())))
            )
    likeliest = model.likeliest

    def timed(hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        start = perf_counter()
        found = likeliest(hidden, k)
        calls.append((_HEAD, start, perf_counter()))
        return found

    model.likeliest = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.likeliest
        for hook in hooks:
            hook.remove()


def bounds(config: PaliGemmaConfig, quantize: str | None, limits: Ceilings, batch: int = 1) -> dict[str, Part]:
    """The least seconds of each part that multiplies: for a batch of prompts, and for the token after each."""
    rate = limits.flops_per_s["int8" if quantize == "int8-dynamic" else "bfloat16"]
    itemsize = 1 if quantize else 2

    def bound(weights: int, rows: int, flops: int = 0, cached: int = 0) -> float:
        """Of weights, by so many rows of each example, which also needs other products, and numbers from its cache."""
        bytes_ = weights * itemsize + batch * cached * 2
        return max(bytes_ / limits.bytes_per_s, batch * (2 * weights * rows + flops) / rate)

    vision, text = config.vision_config, config.text_config
    image, d = vision.num_image_tokens, vision.hidden_size
    tokens, layers = image + PROMPT, text.num_hidden_layers
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    mlp, attention = 3 * text.hidden_size * text.intermediate_size, 2 * text.hidden_size * (q + kv)
    pairs = visible_pairs({"queries": tokens, "tokens": tokens, "prefix": tokens})
    head = text.hidden_size * text.vocab_size
    return {
        "image encoder, attention": Part(vision.num_hidden_layers * bound(4 * d * d, image, 4 * image * image * d)),
        "image encoder, MLP": Part(vision.num_hidden_layers * bound(2 * d * vision.intermediate_size, image)),
        "projector": Part(bound(d * text.hidden_size, image)),
        # Of the last layer only keys and values are wanted of all tokens.
        "decoder, attention": Part(
            (layers - 1) * bound(attention, tokens, 4 * q * pairs) + bound(2 * text.hidden_size * kv, tokens),
            layers * bound(attention, 1, 4 * q * tokens, 2 * kv * tokens),
        ),
        "decoder, MLP": Part((layers - 1) * bound(mlp, tokens) + bound(mlp, 1), layers * bound(mlp, 1)),
        _HEAD: Part(bound(head, 1), bound(head, 1)),
    }


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("checkpoint", type=Path)
    options = parser.parse_args()
    print(json.dumps(asdict(session(options.name, options.checkpoint))))


if __name__ == "__main__":
    _main()
