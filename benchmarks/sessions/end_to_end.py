"""A user's run of a whole model in a process of its own: load a checkpoint, ask about images, watch the answers.

The suite times stages of models in memory. These runs also measure loading and the peak memory of the process. Our
contenders report how long each part of the model (on a GPU: each kernel) took, beside the machine's lower bound for it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from pg_kernels.benchmarks.cases.catalogue import PROMPT
from pg_kernels.benchmarks.cases.models import filled
from pg_kernels.benchmarks.cases.ops import visible_pairs
from pg_kernels.benchmarks.measure.machine import ceilings, device_name, versions
from pg_kernels.benchmarks.measure.model_trial import LARGEST_REGRET, regret
from pg_kernels.benchmarks.report.results import Ceilings
from pg_kernels.benchmarks.report.text import duration, markdown_table
from pg_kernels.benchmarks.sessions import end_to_end_process
from pg_kernels.benchmarks.sessions.end_to_end_process import CONTENDERS, HEAD, Part, prompts
from pg_kernels.model import PaliGemma, PaliGemmaConfig
from pg_kernels.model.files import json_bytes, write_atomically

BASELINE = "transformers bfloat16"


def contenders(device: torch.device) -> list[str]:
    """Return the contenders that run on `device`. Compiled transformers runs on GPUs only."""
    return [name for name, contender in CONTENDERS.items() if device.type == "cuda" or not contender.static_cache]


def run(
    model: str,
    folder: Path,
    *,
    device: torch.device,
    batches: Sequence[int],
    rounds: int,
    names: Sequence[str],
    command: str,
) -> dict[str, Any]:
    """Run all contenders in random order in each round, and store the results as `session.json` and `.md`.

    The results, also failures and their reasons, are stored after every process. At the end the quality of the answers is added.
    """
    config = PaliGemmaConfig.named(model)
    limits = ceilings(device)
    content: dict[str, Any] = {
        "model": model,
        "device": device_name(device),
        "versions": versions(),
        "command": command,
        "sessions": {name: [] for name in names},
        "failed": {},
        "regrets": {},
    }
    with TemporaryDirectory() as temporary:
        checkpoint = Path(temporary)
        filled(config, torch.bfloat16, torch.device("cpu")).save_pretrained(checkpoint)
        draw = random.Random(0)
        with tqdm(total=rounds * len(names), desc="sessions", unit="process", disable=None) as bar:
            for _ in range(rounds):
                for name in draw.sample(names, len(names)):
                    try:
                        content["sessions"][name].append(_in_a_process(name, checkpoint, device, batches, folder))
                    except RuntimeError as error:
                        content["failed"][name] = str(error)
                    bar.update()
                    # The bandwidth of shared memory varies over time. The ceiling is the best value seen.
                    limits = limits if device.type == "cuda" else _higher(limits, ceilings(device))
                    content["ceilings"] = asdict(limits)
                    content["bounds"] = {
                        name: {str(b): _as_json(bounds(config, CONTENDERS[name].quantize, limits, b)) for b in batches}
                        for name in names
                    }
                    _store(content, folder)
        content["regrets"] = _regrets(content["sessions"], PaliGemma.from_pretrained(checkpoint, device=device))
    _store(content, folder)
    return content


def _store(content: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "session.json", json_bytes(content))
    write_atomically(folder / "session.md", (markdown(content) + "\n").encode())


def _as_json(parts: Mapping[str, Part]) -> dict[str, Any]:
    return {name: asdict(part) for name, part in parts.items()}


def _regrets(sessions: Mapping[str, list[dict[str, Any]]], model: PaliGemma) -> dict[str, float]:
    """Return, for each contender, how far its worst token for the first prompt lies below the best one."""
    device = next(model.parameters()).device
    inputs = {"model": model, **prompts(model.config, 1, device)}
    answers = {
        name: {tuple(answer["tokens"]) for session in found for answer in session["answers"].values() if answer}
        for name, found in sessions.items()
    }
    return {
        name: max(regret(inputs, torch.tensor([tokens], device=device)) for tokens in found)
        for name, found in answers.items()
        if found
    }


def markdown(content: Mapping[str, Any]) -> str:
    """Return tables of stored runs: medians over the rounds, ratios to transformers, and the time of each part."""
    sessions = {name: found for name, found in content["sessions"].items() if found}
    batches = list(dict.fromkeys(batch for found in sessions.values() for batch in found[0]["answers"]))

    def middle(name: str, batch: str, what: str) -> float | None:
        found = [session["answers"][batch] for session in sessions.get(name, ())]
        return median(answer[what] for answer in found) if found and all(found) else None

    def cells(name: str, batch: str) -> list[str]:
        shown = {"first_token_s": duration, "tokens_per_s": "{:.2f}".format}
        row = []
        for what, text in shown.items():
            own, base = middle(name, batch, what), middle(BASELINE, batch, what)
            ratio = "" if base is None or own is None or name == BASELINE else f" ({own / base:.2f}×)"
            row.append("out of memory" if own is None else text(own) + ratio)
        peak = middle(name, batch, "peak_bytes")
        return [*row, "–" if peak is None else f"{_highest(sessions[name], batch) / 1e9:.2f} GB"]

    lines = [
        (name, batch, duration(median(session["load_s"] for session in found)), *cells(name, batch))
        for batch in batches
        for name, found in sessions.items()
    ]
    processes = max(map(len, sessions.values()), default=0)
    header = ("contender", "prompts", "load", "first token", "tokens/s", "peak memory")
    blocks = [
        f"{content['model']}, random weights, an image and {PROMPT} tokens of text each prompt, on {content['device']} "
        f"({', '.join(f'{name} {version}' for name, version in content['versions'].items())}); `{content['command']}`; "
        f"medians of {processes} process{'es' * (processes != 1)} each, in random order:",
        markdown_table(header, lines),
    ]
    blocks += [f"{name} failed: {why}" for name, why in content["failed"].items()]
    blocks += [
        f"{name} gave wrong tokens: one of them is {found:.2f} standard deviations of the logits below the best"
        for name, found in content["regrets"].items()
        if found > LARGEST_REGRET
    ]
    for name, found in sessions.items():
        for batch in batches:
            if all(session["answers"][batch] and session["answers"][batch]["parts"] for session in found):
                prompt = f"{batch} prompt{'s' * (batch != '1')}"
                blocks += [
                    f"Where the time of {name} goes with {prompt}, and the least for its bytes and products:",
                    _parts(
                        [session["answers"][batch]["parts"] for session in found],
                        content["bounds"].get(name, {}).get(batch, {}),
                    ),
                ]
    return "\n\n".join(blocks)


def _highest(sessions: Sequence[Mapping[str, Any]], batch: str) -> int:
    return max(session["answers"][batch]["peak_bytes"] for session in sessions)


def _parts(sessions: Sequence[Mapping[str, Mapping[str, float]]], bounds: Mapping[str, Mapping[str, float]]) -> str:
    stages = ("prefill_s", "decode_s")
    names = list(dict.fromkeys(name for parts in sessions for name in parts))
    took = {
        name: [median(parts.get(name, {}).get(stage, 0.0) for parts in sessions) for stage in stages] for name in names
    }
    least = {name: [bounds.get(name, {}).get(stage, 0.0) for stage in stages] for name in names}
    took["sum"] = [sum(column) for column in zip(*took.values(), strict=True)]
    least["sum"] = [sum(part[stage] for part in bounds.values()) for stage in stages]
    launches = {name: sessions[0].get(name, {}).get("launches") for name in names}
    counted = any(launches.values())
    lines = []
    for name in took:
        cells = [name]
        for own, bound in zip(took[name], least[name], strict=True):
            cells += [duration(own) if own > 0 else "–", duration(bound) if bound else "–"]
            cells.append(f"{bound / own:.0%}" if own > 0 and bound else "–")
        if counted:
            cells.append(f"{launches[name]:.0f}" if launches.get(name) else "–")
        lines.append(tuple(cells))
    header = ("part", "first token", "bound", "reached", "a further token", "bound", "reached")
    return markdown_table((*header, "launches for it") if counted else header, lines)


def _higher(one: Ceilings, other: Ceilings) -> Ceilings:
    return Ceilings(
        max(one.copy_bytes_per_s, other.copy_bytes_per_s),
        max(one.read_bytes_per_s, other.read_bytes_per_s),
        {name: max(rate, other.flops_per_s[name]) for name, rate in one.flops_per_s.items()},
    )


def _in_a_process(
    name: str, checkpoint: Path, device: torch.device, batches: Sequence[int], folder: Path
) -> dict[str, Any]:
    command = [sys.executable, "-m", end_to_end_process.__name__, name, str(checkpoint), "--device", str(device)]
    command += [option for batch in batches for option in ("--batch", str(batch))]
    if device.type == "cuda":
        command += ["--trace", str(folder / f"trace-{name.replace(' ', '-')}.json.gz")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def bounds(config: PaliGemmaConfig, quantize: str | None, limits: Ceilings, batch: int = 1) -> dict[str, Part]:
    """Return the lower bound in seconds of each part with matrix products: for a batch of prompts, and for one further token."""
    rate = limits.flops_per_s["int8" if quantize == "int8-dynamic" else "bfloat16"]
    itemsize = 1 if quantize else 2

    def bound(weights: int, rows: int, flops: int = 0, cached: int = 0) -> float:
        """Return the seconds for `weights` applied to `rows` of each example, plus `flops` and `cached` numbers per example."""
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
        # The last layer computes only keys and values for all tokens.
        "decoder, attention": Part(
            (layers - 1) * bound(attention, tokens, 4 * q * pairs) + bound(2 * text.hidden_size * kv, tokens),
            layers * bound(attention, 1, 4 * q * tokens, 2 * kv * tokens),
        ),
        "decoder, MLP": Part((layers - 1) * bound(mlp, tokens) + bound(mlp, 1), layers * bound(mlp, 1)),
        HEAD: Part(bound(head, 1), bound(head, 1)),
    }
