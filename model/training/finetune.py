"""Fine-tuning on JSON lines: all parameters or LoRA, evaluated on held-out lines."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from pg_kernels.nn import Int8Linear

from ..checkpoints.conversion import copy_heritage
from ..files import json_bytes, read_json_object, temporary_sibling, write_atomically
from ..paligemma import PaliGemma
from ..processor import Processor
from . import fingerprint, parallel
from .data import Collator, JsonLines
from .loading import Batch, batches, micro_batch_size, share
from .lock import exclusive
from .recipe import Lora, Recipe
from .state import BEST, CHECKPOINT, IMAGES, differences, run_identity
from .trainer import suffix_loss, train

if TYPE_CHECKING:
    pass

_RECORD = "finetune.json"
"""The file beside a trained model with the settings that made it (see `run_identity`)."""


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
) -> bool:
    """Train a model on JSON lines and write it, or its adapter, to a folder. An interrupted run continues.

    Returns False, without training, if the folder already holds the result of this run.

    Args:
        model, processor: as loaded. The model is left in the recipe's precision.
        data: the training examples.
        output: a new folder, or the folder of an interrupted run. It gets `log.jsonl`, and at the end a Hugging Face folder.
        recipe: how to train.
        checkpoint: the path that the model was loaded from; adapters refer to it.
        eval_data: examples to evaluate on: the loss, and the share of greedy answers that equal an accepted answer to the letter.
        lora: train only an adapter. The folder then gets PEFT's files.
        merge: returns the float model to merge the adapter into. The folder then gets the merged model instead.
        restart: discard what the folder holds.
        tensorboard: write TensorBoard's files, too.

    Raises:
        ValueError: an example is too long, the folder holds a model or another run, or options exclude each other.
        OSError, RuntimeError, Interrupted: as `train`.
    """
    output, checkpoint = Path(output), Path(checkpoint)
    if merge is not None and lora is None:
        raise ValueError("merge: there is an adapter to merge only with lora")
    kinds = ["config.json", "adapter_config.json"]
    written, other = kinds if lora is None or merge is not None else kinds[::-1]
    if output.resolve() == checkpoint.resolve():
        raise ValueError(f"output: {output} is the checkpoint's folder; use another one")
    quantised = any(isinstance(module, Int8Linear) for module in model.modules())
    if quantised and lora is None:
        raise ValueError("model: its int8 weights cannot be trained; give lora, or a float checkpoint")
    for lines in (data, eval_data):
        if lines is not None:
            lines.check_lengths(processor)
    settings = {
        "the checkpoint's content": fingerprint.of_checkpoint(checkpoint),
        "image_size": processor.image_size,
        "resize": processor.resize,
        "int8": quantised,
        "eval_data": None if eval_data is None else eval_data.fingerprint,
        IMAGES: [None if lines is None else lines.images_fingerprint for lines in (data, eval_data)],
        "lora": None if lora is None else asdict(lora),
    }
    identity = run_identity(data, recipe, settings)

    def save() -> None:
        if lora is None:
            model.save_pretrained(output)
        elif merge is None:
            _save_adapter(trained, output)
        else:
            _merged(trained, merge(), output).save_pretrained(output)
        processor.save_pretrained(output)
        copy_heritage(Path(checkpoint), output)
        write_atomically(output / _RECORD, json_bytes(identity))

    with exclusive(output):
        if (output / other).exists():
            raise ValueError(f"{output} holds a model of another kind ({other}); use another folder")
        if (output / written).exists() and not restart and not (output / CHECKPOINT).exists():
            record = output / _RECORD
            if not record.is_file() or differences(read_json_object(record), identity):
                raise ValueError(
                    f"{output} holds a model already ({written}); use another folder, or restart to replace it"
                )
            (output / BEST).unlink(missing_ok=True)  # left by a kill just before the run's end
            return False
        torch.manual_seed(recipe.seed)  # of the adapter
        trained: Any = model if lora is None else lora.adapt(model)
        if lora is not None:
            trained.peft_config["default"].base_model_name_or_path = str(checkpoint)
        train(
            trained,
            data,
            recipe,
            output,
            collate=Collator(processor, skip_unreadable=data.skip_unreadable),
            evaluate=None if eval_data is None else HeldOutEvaluation(trained, processor, eval_data, recipe),
            save=save,
            settings=settings,
            restart=restart,
            tensorboard=tensorboard,
        )
    return True


class HeldOutEvaluation:
    """The loss of a model on JSON lines, and the share of greedy answers that equal an accepted one, ignoring outer white space.

    Skipped examples count in neither. Their number is a third metric, if there are any.
    """

    def __init__(self, model: nn.Module, processor: Processor, data: JsonLines, recipe: Recipe) -> None:
        self._model: Any = model
        self._processor, self._data = processor, data
        self._recipe = replace(recipe, label_smoothing=0.0)
        answers = (suffix for example in data.examples for suffix in example.suffixes)
        self._longest = max(len(processor.tokenizer.encode(answer)) for answer in answers) + 1

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        size = micro_batch_size(self._recipe)
        chunks = [range(start, min(start + size, len(self._data))) for start in range(0, len(self._data), size)]
        collate = Collator(self._processor, prompts=True, skip_unreadable=self._data.skip_unreadable)
        found = batches(self._data, chunks, self._recipe, collate)
        loss, count, right, answered = 0.0, 0, 0, 0
        device = next(self._model.parameters()).device
        silent = None if parallel.rank() == 0 else True
        for chunk, batch in zip(
            chunks, tqdm(found, desc="evaluating", total=len(chunks), leave=False, disable=silent), strict=True
        ):
            batch.pop("skipped", None)
            kept = (batch["labels"] != -100).any(1).tolist()
            part = share(batch, self._recipe)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            features = self._model.get_image_features(batch.pop("pixel_values"))[batch.pop("image_index")]
            prompts = {name: batch.pop(name) for name in list(batch) if name.startswith("prompt_")}
            batch["image_features"] = features
            loss += part * float(suffix_loss(self._model, batch, self._recipe))
            count += part
            texts = self._answers({name.removeprefix("prompt_"): tensor for name, tensor in prompts.items()}, features)
            for index, text, asked in zip(chunk, texts, kept, strict=True):
                right += asked and text.strip() in [suffix.strip() for suffix in self._data[index].suffixes]
            answered += sum(kept)
        self._model.graph_cache.clear()  # free the memory for training
        metrics = {"loss": loss / max(1, count), "exact_match": right / max(1, answered)}
        return metrics | ({"skipped": len(self._data) - answered} if answered < len(self._data) else {})

    def _answers(self, prompts: Batch, features: torch.Tensor) -> list[str]:
        room = self._processor.max_position_embeddings - prompts["input_ids"].shape[1]
        # Disable the end token: processes gather layers together, and rounding could let one process stop before another.
        ends = None if parallel.world() == 1 else -1
        ids = self._model.generate(
            **prompts, image_features=features, max_new_tokens=min(self._longest, room), eos_token_id=ends
        )
        return self._processor.decode(ids)


def _save_adapter(model: Any, folder: Path) -> None:
    """Write PEFT's files, each atomically."""
    with temporary_sibling(folder / "adapter") as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)  # only the adapter is trained
        for path in temporary.iterdir():
            os.replace(path, folder / path.name)


def _merged(adapted: Any, model: PaliGemma, folder: Path) -> PaliGemma:
    from peft import PeftModel

    with temporary_sibling(folder / "adapter") as temporary:
        adapted.save_pretrained(
            temporary, save_embedding_layers=False
        )  # the trained model's adapter weights are more precise
        merged: Any = PeftModel.from_pretrained(model, temporary).merge_and_unload()
    return merged
