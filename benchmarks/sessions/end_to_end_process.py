"""One process of an end-to-end run: load a checkpoint, ask about images, watch the answers."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from pg_kernels.benchmarks.cases.catalogue import ANSWER, PROMPT
from pg_kernels.benchmarks.measure.timing import seconds
from pg_kernels.model import PaliGemma
from pg_kernels.model.paligemma import MultiModalProjector
from pg_kernels.model.siglip import SiglipAttention, SiglipMLP
from pg_kernels.nn import GeGLUMLP, LayerNorm, PrefixLMAttention, RMSNorm


@dataclass(frozen=True)
class EndToEndContender:
    """The package that runs the model, and its options."""

    package: str
    quantize: str | None = None
    static_cache: bool = False
    """Use a static cache. On a GPU, transformers then compiles the decoding step."""


CONTENDERS: dict[str, EndToEndContender] = {
    "pg_kernels int8": EndToEndContender("pg_kernels", "int8"),
    "pg_kernels int8-dynamic": EndToEndContender("pg_kernels", "int8-dynamic"),
    "pg_kernels bfloat16": EndToEndContender("pg_kernels"),
    "transformers bfloat16": EndToEndContender("transformers"),
    "transformers bfloat16, compiled with a static cache": EndToEndContender("transformers", static_cache=True),
}
TOKENS = {"cpu": ANSWER, "cuda": 4 * ANSWER}
"""Tokens per answer. The cache capacity grows in steps of 128 and is the same for an answer of one token."""
KERNELS = 16
"""The number of GPU kernels that are listed, slowest first."""
_REPETITIONS = 5
HEAD = "output head"
_REST = "embedding, residuals and Python"
_BETWEEN, _OTHERS = "between kernels", "other kernels"


@dataclass(frozen=True)
class Part:
    """Seconds that a part of the model or a kernel took, or the machine's lower bound for it."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    """Seconds per token."""
    launches: float | None = None
    """Launches of a kernel per token."""


@dataclass(frozen=True)
class TimedAnswer:
    """The measurements of one batch of prompts."""

    first_token_s: float
    """Seconds to the first token, after a warm-up that starts threads, touches memory, compiles and captures graphs."""
    tokens_per_s: float
    """Tokens per second of the whole batch, without the first token."""
    peak_bytes: int
    """Peak resident memory of the process; on a GPU, the peak of torch's reserved memory, CUDA graphs included."""
    tokens: list[int]
    """Token ids of the first prompt's answer."""
    parts: Mapping[str, Part]


@dataclass(frozen=True)
class EndToEndRun:
    """The measurements of one process."""

    load_s: float
    answers: Mapping[int, TimedAnswer | None]
    """Answers by batch size; None if the GPU ran out of memory."""


def run(name: str, checkpoint: Path, device: torch.device, batches: Sequence[int], trace: Path | None) -> EndToEndRun:
    """Load a checkpoint and answer batches of prompts. On a GPU, the first batch's timeline is written to `trace`."""
    contender = CONTENDERS[name]
    load = _load_ours if contender.package == "pg_kernels" else _load_theirs
    models: list[Any] = []
    load_s = seconds(lambda: models.append(load(checkpoint, contender, device)), device)
    answers: dict[int, TimedAnswer | None] = {}
    for batch in batches:
        try:
            answers[batch] = _answer(models[0], contender, device, batch, trace if batch == batches[0] else None)
        except torch.OutOfMemoryError:
            answers[batch] = None
        if contender.package == "pg_kernels":
            models[0].graph_cache.clear()
    return EndToEndRun(load_s, answers)


def _load_ours(checkpoint: Path, contender: EndToEndContender, device: torch.device) -> PaliGemma:
    return PaliGemma.from_pretrained(checkpoint, quantize=contender.quantize, device=device)


def _load_theirs(checkpoint: Path, contender: EndToEndContender, device: torch.device) -> Any:
    from transformers import PaliGemmaForConditionalGeneration

    model = PaliGemmaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16).eval().to(device)
    if contender.static_cache:
        model.generation_config.cache_implementation = "static"
    return model


def prompts(config: Any, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Return inputs of our and transformers' `generate`: random images, each with `PROMPT` random tokens of text."""
    words, colours = (
        torch.Generator().manual_seed(seed) for seed in range(2)
    )  # the first prompt is the same in every batch
    size: int = config.vision_config.image_size
    tokens = (size // config.vision_config.patch_size) ** 2
    text = torch.randint(min(256_000, config.text_config.vocab_size), (batch, PROMPT), generator=words)
    ids = torch.cat((torch.full((batch, tokens), int(config.image_token_id)), text), 1).to(device)
    pixels = torch.rand(batch, 3, size, size, generator=colours).mul_(2).sub_(1)
    return {
        "input_ids": ids,
        "pixel_values": pixels.to(device, torch.bfloat16),
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }


def _answer(
    model: Any, contender: EndToEndContender, device: torch.device, batch: int, trace: Path | None
) -> TimedAnswer:
    inputs = prompts(model.config, batch, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return _clocked(model, contender, inputs, device, trace)
    for _ in range(2):
        arrivals, tokens = _watched(model, contender, inputs)
    peak = resident_bytes()
    rate = batch * (len(arrivals) - 2) / (arrivals[-1] - arrivals[1])
    parts = _breakdown(model, contender, inputs) if contender.package == "pg_kernels" else {}
    return TimedAnswer(arrivals[1] - arrivals[0], rate, peak, tokens[0].tolist(), parts)


def resident_bytes() -> int:
    """Return the peak resident bytes since this program started. Linux's rusage also counts the process that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _generate(
    model: Any,
    contender: EndToEndContender,
    inputs: Mapping[str, Tensor],
    tokens: int,
    arrived: Callable[[], None] | None = None,
) -> Tensor:
    """Generate `tokens` new tokens and return them, [B, tokens]. `arrived` is called after each token."""
    options: dict[str, Any] = {"max_new_tokens": tokens}
    if contender.package == "pg_kernels":
        stream = None if arrived is None else lambda _: arrived()
        return model.generate(**inputs, **options, eos_token_id=-1, stream=stream)
    streamer = None if arrived is None else _Streamer(arrived)
    options |= {"min_new_tokens": tokens, "do_sample": False, "streamer": streamer}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


class _Streamer:
    """A streamer for transformers, which sends the prompt first and then every token."""

    def __init__(self, arrived: Callable[[], None]) -> None:
        self.arrived = arrived
        self.began = False

    def put(self, tokens: Tensor) -> None:
        if self.began:
            self.arrived()
        self.began = True

    def end(self) -> None:
        pass


# --- on a CPU: every token, and the parts of our model by hooks


def _watched(model: Any, contender: EndToEndContender, inputs: Mapping[str, Tensor]) -> tuple[list[float], Tensor]:
    """Return the time of the call and of each token of an answer, and the tokens."""
    arrivals = [perf_counter()]
    tokens = _generate(model, contender, inputs, TOKENS["cpu"], lambda: arrivals.append(perf_counter()))
    return arrivals, tokens


_KINDS: dict[type[nn.Module], str] = {
    SiglipAttention: "image encoder, attention",
    SiglipMLP: "image encoder, MLP",
    MultiModalProjector: "projector",
    PrefixLMAttention: "decoder, attention",
    GeGLUMLP: "decoder, MLP",
    RMSNorm: "norms",
    LayerNorm: "norms",
}


def _breakdown(model: PaliGemma, contender: EndToEndContender, inputs: Mapping[str, Tensor]) -> dict[str, Part]:
    calls: list[tuple[str, float, float]] = []
    with _clocks(model, calls):
        times, _ = _watched(model, contender, inputs)
    spent: list[dict[str, float]] = []
    for begin, end in pairwise(times):
        parts: dict[str, float] = {}
        for part, start, stop in calls:
            if begin <= start < end:
                parts[part] = parts.get(part, 0.0) + stop - start
        spent.append({**parts, _REST: end - begin - sum(parts.values())})
    return {
        name: Part(spent[0].get(name, 0.0), median(step.get(name, 0.0) for step in spent[1:]))
        for name in [*dict.fromkeys(_KINDS.values()), HEAD, _REST]
    }


@contextmanager
def _clocks(model: PaliGemma, calls: list[tuple[str, float, float]]) -> Iterator[None]:
    """Record the name, start and end of every call of a model part."""
    starts: list[float] = []
    hooks = []
    for module in model.modules():
        if type(module) in _KINDS:
            part = _KINDS[type(module)]
            hooks.append(module.register_forward_pre_hook(lambda *_: starts.append(perf_counter())))
            hooks.append(
                module.register_forward_hook(lambda *_, part=part: calls.append((part, starts.pop(), perf_counter())))
            )
    topk_logits = model.topk_logits

    def timed(hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        start = perf_counter()
        found = topk_logits(hidden, k)
        calls.append((HEAD, start, perf_counter()))
        return found

    model.topk_logits = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.topk_logits
        for hook in hooks:
            hook.remove()


# --- on a GPU: whole answers, because streaming synchronises after every token; kernels come from the profiler


def _clocked(
    model: Any, contender: EndToEndContender, inputs: Mapping[str, Tensor], device: torch.device, trace: Path | None
) -> TimedAnswer:
    steps = TOKENS[device.type] - 1
    found: list[Tensor] = []

    def one() -> None:
        _generate(model, contender, inputs, 1)

    def all_() -> None:
        found[:] = [_generate(model, contender, inputs, 1 + steps)]

    # Run each twice: a CUDA graph is captured in its second run. Run the longest first: it sets transformers' cache size.
    for call in (all_, all_, one, one):
        call()
    times = [(seconds(one, device), seconds(all_, device)) for _ in range(_REPETITIONS)]
    first, whole = (median(column) for column in zip(*times, strict=True))
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else resident_bytes()
    rate = len(found[0]) * steps / (whole - first)
    parts = {}
    if contender.package == "pg_kernels":
        parts = _kernels(one, all_, device, steps, Part(first, (whole - first) / steps), trace)
    return TimedAnswer(first, rate, peak, found[0][0].tolist(), parts)


def _kernels(
    one: Callable[[], None],
    all_: Callable[[], None],
    device: torch.device,
    steps: int,
    wall: Part,
    trace: Path | None,
) -> dict[str, Part]:
    """Return each kernel's time in the first token and in a further one, from the difference of a long and a short answer."""
    short, long = _profiled(one, device), _profiled(all_, device, trace)
    found = {}
    for name, (spent, launches) in long.items():
        before, launched = short.get(name, (0.0, 0))
        more = launches - launched
        found[name] = Part(before, (spent - before) / steps if more else 0.0, more / steps)
    ordered = sorted(found, key=lambda name: (found[name].decode_s, found[name].prefill_s), reverse=True)
    busy = _sum(found.values())
    return {
        **{name: found[name] for name in ordered[:KERNELS]},
        _OTHERS: _sum(found[name] for name in ordered[KERNELS:]),
        # Negative if kernels overlap.
        _BETWEEN: Part(wall.prefill_s - busy.prefill_s, wall.decode_s - busy.decode_s),
    }


def _sum(parts: Iterable[Part]) -> Part:
    parts = list(parts)
    launches = sum(part.launches or 0.0 for part in parts)
    return Part(sum(part.prefill_s for part in parts), sum(part.decode_s for part in parts), launches)


def _profiled(
    call: Callable[[], None], device: torch.device, trace: Path | None = None
) -> dict[str, tuple[float, int]]:
    """Return the seconds and launches of every kernel in a call, by short name."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences Kineto's messages on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        seconds(call, device)
    kernels: dict[str, tuple[float, int]] = {}
    for event in profile.events():
        if event.device_type.name.lower() == device.type:
            spent, launches = kernels.get(short_name(event.name), (0.0, 0))
            kernels[short_name(event.name)] = spent + event.time_range.elapsed_us() / 1e6, launches + 1
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(trace))
    return kernels


def short_name(kernel: str) -> str:
    """Return a kernel's name without namespaces and arguments. Of its template it keeps the elementwise functor."""
    name, _, template = kernel.removeprefix("void ").replace("(anonymous namespace)::", "").partition("<")
    name = name.partition("(")[0].rpartition("::")[2].strip()[:60]
    inner = re.findall(r"\w*(?:Functor|Op|Kernel)\w*", template)
    return f"{name}<{inner[0]}>" if inner else name


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()
    found = run(options.name, options.checkpoint, options.device, options.batch or [1], options.trace)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    _main()
