"""The loss of quality by quantisation: a quantised model compared with its original."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .gemma import Gemma2DecoderLayer, GemmaDecoderLayer
from .paligemma import MultiModalProjector, PaliGemma
from .processor import Processor
from .siglip import SiglipEncoderLayer

_WATCHED = (SiglipEncoderLayer, MultiModalProjector, GemmaDecoderLayer, Gemma2DecoderLayer)


@dataclass(frozen=True)
class QuantizationReport:
    """The differences between a quantised model and its original when both read the original's answers."""

    layers: Mapping[str, float]
    """For each layer's output, the Frobenius norm of the difference divided by the original's, over all prompts and tokens."""
    kl_divergence: float
    """Mean over the answers' tokens of KL(original ‖ quantised) of the next token's distribution, in nats."""
    top1_agreement: float
    """The share of tokens for which both models' most likely token is the same."""
    same_answers: float
    """The share of prompts that both answer with the same tokens."""
    prompts: int
    tokens: int

    def as_json(self) -> dict[str, object]:
        """Return the report as a JSON object."""
        return asdict(self)


@torch.inference_mode()
def compare(
    original: PaliGemma,
    quantised: PaliGemma,
    processor: Processor,
    tasks: Sequence[tuple[Image.Image, str]],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
) -> QuantizationReport:
    """Let the original answer each (image, prompt) greedily, and let both models score these answers token by token.

    Raises ValueError for no tasks, and what the processor raises.
    """
    if not tasks:
        raise ValueError("tasks: expected at least one image with its prompt")
    device = next(original.parameters()).device
    errors, sizes = ({name: 0.0 for name in _watched(original)} for _ in range(2))
    divergence, agreeing, tokens, same = 0.0, 0, 0, 0
    starts = range(0, len(tasks), batch_size)
    for start in tqdm(starts, desc="comparing", unit="batch", delay=1.0, disable=None):
        images, prompts = zip(*tasks[start : start + batch_size], strict=True)
        inputs = processor(list(images), list(prompts)).to(device)
        answers, others = (
            _padded(model.generate(**inputs, max_new_tokens=max_new_tokens), max_new_tokens, original)
            for model in (original, quantised)
        )
        same += int((answers == others).all(1).sum())
        forced = _with_answers(inputs, answers, original)
        expected, outputs = _watch(original, forced)
        found, other_outputs = _watch(quantised, forced)
        for name, output in outputs.items():
            errors[name] += float((other_outputs[name] - output).square().sum())
            sizes[name] += float(output.square().sum())
        counted = forced["attention_mask"][:, -answers.shape[1] :].bool()
        left, right = (logits[:, :-1][counted].log_softmax(-1) for logits in (expected, found))
        divergence += float(F.kl_div(right, left, reduction="sum", log_target=True))
        agreeing += int((left.argmax(-1) == right.argmax(-1)).sum())
        tokens += int(counted.sum())
    return QuantizationReport(
        {name: (errors[name] / sizes[name]) ** 0.5 if errors[name] else 0.0 for name in errors},
        divergence / tokens,
        agreeing / tokens,
        same / len(tasks),
        len(tasks),
        tokens,
    )


def _watched(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _WATCHED)}


def _watch(model: PaliGemma, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of the answers' tokens and the token before, and every watched layer's output without padding tokens."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor | tuple[Tensor, Tensor]) -> None:
        """Add the two parts of a block's output (see `GemmaDecoderLayer`)."""
        outputs[name] = (output if isinstance(output, Tensor) else output[0] + output[1]).float()

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name, module in _watched(model).items()
    ]
    answered = int((inputs["token_type_ids"][0] == 1).sum())
    try:
        logits = model(**inputs, logits_to_keep=answered + 1).logits
    finally:
        for hook in hooks:
            hook.remove()
    valid = inputs["attention_mask"].bool()
    # The states of padding tokens have no effect.
    return logits, {name: out[valid] if out.shape[:2] == valid.shape else out for name, out in outputs.items()}


def _padded(answers: Tensor, length: int, model: PaliGemma) -> Tensor:
    return F.pad(answers, (0, length - answers.shape[1]), value=model.config.pad_token_id)


def _with_answers(inputs: Mapping[str, Tensor], answers: Tensor, model: PaliGemma) -> dict[str, Tensor]:
    """Append answers to prompts, with padding on the right of shorter answers."""
    ended = torch.isin(answers, answers.new_tensor(model.config.eos_token_id)).cumsum(1) > 0
    valid = ended.roll(1, 1).index_fill(1, torch.zeros(1, dtype=torch.int64, device=ended.device), False).logical_not()
    return {
        **inputs,
        "input_ids": torch.cat((inputs["input_ids"], answers), 1),
        "attention_mask": torch.cat((inputs["attention_mask"], valid.to(inputs["attention_mask"].dtype)), 1),
        "token_type_ids": torch.cat((torch.zeros_like(inputs["input_ids"]), torch.ones_like(answers)), 1),
    }


def table(layers: Mapping[str, float]) -> Iterable[str]:
    """Yield a line for each layer: its relative error, and a bar of that length."""
    longest = max(map(len, layers))
    most = max(layers.values())
    for name, error in layers.items():
        yield f"{name:{longest}}  {error:7.3%}  {'█' * round(30 * error / most) if most else ''}"
