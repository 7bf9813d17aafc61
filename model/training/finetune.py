"""Fine-tuning on JSON lines: all parameters or LoRA, evaluated on lines that are held out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from pg_kernels.nn import Int8Linear

from ..files import temporary_sibling
from ..paligemma import PaliGemma
from ..processor import Processor
from . import parallel
from .data import Collator, JsonLines
from .recipe import Recipe
from .state import CHECKPOINT
from .trainer import Batch, micro_batch_size, share, suffix_loss, train

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter, by PEFT; `targets` is a regular expression for the names of the layers that it adapts.

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
        """Put a new adapter over a model, whose own parameters are then frozen; ValueError where it does not fit."""
        if find_spec("peft") is None:
            raise RuntimeError("LoRA needs the package `peft`: pip install peft")
        from peft import LoraConfig, get_peft_model

        from pg_kernels.integrations.peft import register

        alpha = 2 * self.rank if self.alpha is None else self.alpha
        config = LoraConfig(r=self.rank, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=self.targets)
        return get_peft_model(model, register(config))


def finetune(
    model: PaliGemma,
    processor: Processor,
    data: JsonLines,
    output: str | Path,
    recipe: Recipe,
    *,
    checkpoint: str | Path,
    eval_data: JsonLines | None = None,
    lora: Lora | None = None,
    merge: Callable[[], PaliGemma] | None = None,
    restart: bool = False,
    tensorboard: bool = False,
) -> None:
    """Train a model on JSON lines and write it, or its adapter, to a folder; a run that was cut off goes on by itself.

    Args:
        model, processor: as loaded; the model computes in the recipe's precision from then on.
        data: what to learn.
        output: a new folder, or that of a run that was cut off: it gets `log.jsonl` and at the end a Hugging Face folder.
        recipe: how to train.
        checkpoint: what the model was loaded from, which adapters name as theirs.
        eval_data: what to evaluate on: the loss, and the share of greedy answers that equal an accepted one to the letter.
        lora: train an adapter only; the folder then gets PEFT's files.
        merge: gives the float model that the adapter is merged into; the folder then gets the result instead.
        restart: throw away what the folder holds.
        tensorboard: write TensorBoard's files, too.

    Raises:
        ValueError: an example is too long, the folder holds a model or another run, options that exclude each other.
        OSError, RuntimeError: as `train`.
    """
    output = Path(output)
    if merge is not None and lora is None:
        raise ValueError("merge: there is an adapter to merge only with lora")
    kinds = ["config.json", "adapter_config.json"]
    written, other = kinds if lora is None or merge is not None else kinds[::-1]
    if (output / other).exists():
        raise ValueError(f"{output} holds a model of another kind ({other}); use another folder")
    if (output / written).exists() and not restart and not (output / CHECKPOINT).exists():
        raise ValueError(f"{output} holds a model already ({written}); use another folder, or restart to replace it")
    quantised = any(isinstance(module, Int8Linear) for module in model.modules())
    if quantised and lora is None:
        raise ValueError("model: its int8 weights cannot be trained; give lora, or a float checkpoint")
    for lines in (data, eval_data):
        if lines is not None:
            lines.check_lengths(processor)
    torch.manual_seed(recipe.seed)  # of the adapter
    trained: Any = model if lora is None else lora.adapt(model)
    if lora is not None:
        trained.peft_config["default"].base_model_name_or_path = str(checkpoint)

    def save() -> None:
        if lora is None:
            model.save_pretrained(output)
        elif merge is None:
            _save_adapter(trained, output)
        else:
            _merged(trained, merge(), output).save_pretrained(output)
        processor.save_pretrained(output)

    train(
        trained,
        data,
        recipe,
        output,
        collate=Collator(processor),
        evaluate=None if eval_data is None else Evaluation(trained, processor, eval_data, recipe),
        save=save,
        settings={
            "checkpoint": str(checkpoint),
            "image_size": processor.image_size,
            "resize": processor.resize,
            "int8": quantised,
            "eval_data": None if eval_data is None else eval_data.fingerprint,
            "lora": None if lora is None else asdict(lora),
        },
        restart=restart,
        tensorboard=tensorboard,
    )


class Evaluation:
    """The loss of a model on JSON lines, and how many greedy answers equal an accepted one; white space around does not count."""

    def __init__(self, model: nn.Module, processor: Processor, data: JsonLines, recipe: Recipe) -> None:
        self._model: Any = model
        self._processor, self._data = processor, data
        self._recipe = replace(recipe, label_smoothing=0.0)
        answers = (suffix for example in data.examples for suffix in example.suffixes)
        self._longest = max(len(processor.tokenizer.encode(answer)) for answer in answers) + 1

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        size = micro_batch_size(self._recipe)
        loader = DataLoader(
            self._data,  # type: ignore[arg-type]
            batch_size=size,
            collate_fn=Collator(self._processor, prompts=True),
            num_workers=self._recipe.workers,
            generator=torch.Generator().manual_seed(self._recipe.seed),
        )
        loss, count, right = 0.0, 0, 0
        device = next(self._model.parameters()).device
        silent = None if parallel.rank() == 0 else True
        for start, batch in zip(
            range(0, len(self._data), size), tqdm(loader, desc="evaluating", leave=False, disable=silent), strict=True
        ):
            part = share(batch, self._recipe)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            features = self._model.get_image_features(batch.pop("pixel_values"))[batch.pop("image_index")]
            prompts = {name: batch.pop(name) for name in list(batch) if name.startswith("prompt_")}
            batch["image_features"] = features
            loss += part * float(suffix_loss(self._model, batch, self._recipe))
            count += part
            texts = self._answers({name.removeprefix("prompt_"): tensor for name, tensor in prompts.items()}, features)
            for text, example in zip(texts, self._data.examples[start : start + size], strict=True):
                right += text.strip() in [suffix.strip() for suffix in example.suffixes]
        self._model.sessions.clear()  # memory that training has other uses for
        return {"loss": loss / max(1, count), "exact_match": right / len(self._data)}

    def _answers(self, prompts: Batch, features: torch.Tensor) -> list[str]:
        room = self._processor.max_position_embeddings - prompts["input_ids"].shape[1]
        # An answer's end must not stop one process while another, by some rounding, goes on: they gather layers together.
        ends = None if parallel.world() == 1 else -1
        ids = self._model.generate(
            **prompts, image_features=features, max_new_tokens=min(self._longest, room), eos_token_id=ends
        )
        return self._processor.decode(ids)


def _save_adapter(model: Any, folder: Path) -> None:
    """Write PEFT's files, each of them all at once."""
    with temporary_sibling(folder / "adapter") as temporary:
        model.save_pretrained(temporary)
        for path in temporary.iterdir():
            os.replace(path, folder / path.name)


def _merged(adapted: Any, model: PaliGemma, folder: Path) -> PaliGemma:
    from peft import PeftModel

    with temporary_sibling(folder / "adapter") as temporary:
        adapted.save_pretrained(temporary)
        merged: Any = PeftModel.from_pretrained(model, temporary).merge_and_unload()
    return merged
