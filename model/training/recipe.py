"""The settings of a training run besides model and data."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel

    from ..paligemma import PaliGemma

SCHEDULES = ("cosine", "linear", "rsqrt")
REDUCTIONS = ("example", "token")
PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")

_RUN, _OPTIMIZATION, _SPEED = "the run", "optimization", "speed and memory"


def _option(group: str, default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, **more})


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run besides model and data. The defaults are those of PaliGemma's transfers.

    Each field is documented by its `metadata["help"]`, which command lines show. Raises ValueError naming the field.
    """

    steps: int | None = _option(_RUN, None, "optimizer steps; or give epochs")
    epochs: float | None = _option(_RUN, None, "passes over the data; or give steps")
    batch_size: int = _option(_RUN, 32, "examples a step, over all processes")
    eval_every: int | None = _option(
        _RUN, None, "steps between evaluations, which there are at the start and the end, too"
    )
    patience: int | None = _option(
        _RUN, None, "stop after so many evaluations without a lower loss, and keep the best weights"
    )
    save_every: int = _option(_RUN, 500, "steps between checkpoints")
    save_minutes: float = _option(_RUN, 5.0, "minutes between checkpoints, too; inf for steps alone")
    seed: int = _option(_RUN, 0, "of the order of the data")
    learning_rate: float = _option(_OPTIMIZATION, 1e-5, "the highest one")
    schedule: str = _option(
        _OPTIMIZATION, "cosine", "how it falls after the warm-up: cosine and linear to 0", choices=SCHEDULES
    )
    warmup: float = _option(_OPTIMIZATION, 0.05, "share of all steps in which the learning rate rises")
    optimizer: str = _option(
        _OPTIMIZATION,
        "adamw",
        "muon: orthogonalised momentum for hidden matrices, AdamW for the rest",
        choices=OPTIMIZERS,
    )
    weight_decay: float = _option(
        _OPTIMIZATION, 0.0, "decoupled, of matrices and embeddings; biases and norms have none"
    )
    betas: tuple[float, float] = _option(_OPTIMIZATION, (0.9, 0.999), "of AdamW")
    clip: float = _option(_OPTIMIZATION, 1.0, "largest norm of the gradient; inf for no limit")
    label_smoothing: float = _option(
        _OPTIMIZATION, 0.0, "share of the probability that the loss spreads over the vocabulary"
    )
    loss_reduction: str = _option(
        _OPTIMIZATION,
        "example",
        "example: mean over each answer's tokens first, as big_vision; token: over all",
        choices=REDUCTIONS,
    )
    frozen: tuple[str, ...] = _option(
        _OPTIMIZATION,
        (),
        "parts to leave as they are: vision_tower, multi_modal_projector, language_model, language_model.layers.0, …",
        option="--freeze",
    )
    precision: str = _option(
        _SPEED, "float32", "of the arithmetic; the optimizer always moves fp32", choices=PRECISIONS
    )
    micro_batch: int | None = _option(
        _SPEED, None, "examples a forward pass, when memory is short; gradients are accumulated"
    )
    gradient_checkpointing: bool = _option(
        _SPEED, False, "compute layers anew in the backward pass: less memory, a third more time"
    )
    compile: bool = _option(_SPEED, False, "torch.compile the loss: a slow start, faster steps")
    workers: int = _option(_SPEED, 1, "processes that prepare batches; 0 for none")

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps and epochs: give one of them, got {self.steps} and {self.epochs}")
        positive = ("steps", "epochs", "batch_size", "micro_batch", "clip", "eval_every", "patience")
        for name in (*positive, "save_every", "save_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        for name in ("learning_rate", "weight_decay", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name, values in (
            ("warmup", (self.warmup,)),
            ("label_smoothing", (self.label_smoothing,)),
            ("betas", self.betas),
        ):
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"{name}: expected to lie in [0, 1), got {getattr(self, name)}")
        for name, choices in (
            ("schedule", SCHEDULES),
            ("loss_reduction", REDUCTIONS),
            ("precision", PRECISIONS),
            ("optimizer", OPTIMIZERS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r}; allowed are {', '.join(choices)}")
        if self.batch_size % (self.micro_batch or 1):
            raise ValueError(f"micro_batch: {self.micro_batch} does not divide the batch_size {self.batch_size}")


def learning_rate_factor(step: int, steps: int, recipe: Recipe) -> float:
    """Return the factor of the highest learning rate at a step: a linear warm-up to 1, then the schedule.

    "rsqrt" falls with the inverse square root of the steps done, from 1 at the warm-up's end, whatever the number of steps.
    """
    warmup = max(1, round(recipe.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    if recipe.schedule == "rsqrt":
        return math.sqrt(warmup / (step + 1))
    done = (step - warmup) / max(1, steps - warmup)
    return 1 - done if recipe.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter by PEFT. `targets` is a regular expression for the names of the adapted layers.

    Source: Hu et al., https://arxiv.org/abs/2106.09685.
    """

    rank: int
    alpha: int | None = None
    """Scale of the adapter, over its rank; default: twice the rank."""
    dropout: float = 0.0
    targets: str = r".*language_model.*_proj"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora: expected a rank of at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora's dropout: expected to lie in [0, 1), got {self.dropout}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"lora's targets: {self.targets!r} is no regular expression: {error}") from error

    def adapt(self, model: PaliGemma) -> PeftModel:
        """Wrap a model in a new adapter and freeze the model's own parameters. Raises ValueError if the adapter does not fit."""
        if find_spec("peft") is None:
            raise RuntimeError("LoRA needs the package `peft`: pip install peft")
        from peft import LoraConfig, get_peft_model

        from pg_kernels.integrations.peft import register

        alpha = 2 * self.rank if self.alpha is None else self.alpha
        config = LoraConfig(r=self.rank, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=self.targets)
        return get_peft_model(model, register(config))
