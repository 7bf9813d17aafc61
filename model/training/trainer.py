"""The training loop: optimizers over fp32 masters, gradient accumulation, exact resuming, evaluation and logs."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import parallel
from .optimization import Weights, build_optimizers, freeze
from .recipe import PRECISIONS, Recipe, learning_rate_factor
from .state import Log, State

Batch: TypeAlias = dict[str, Tensor]


def suffix_loss(model: nn.Module, batch: Batch, recipe: Recipe) -> Tensor:
    """The model's loss of its suffixes.

    A batch with `image_index` (int64 [images of the batch, in order]) holds each different image once in `pixel_values`, and
    it is encoded once.
    """
    inputs: dict[str, Any] = dict(batch)
    index = inputs.pop("image_index", None)
    if index is not None:
        network: Any = model
        inputs["image_features"] = network.get_image_features(inputs.pop("pixel_values"))[index]
    return model(**inputs, loss_reduction=recipe.loss_reduction, label_smoothing=recipe.label_smoothing).loss


class _Task(nn.Module):
    """A model, what it is to minimise, and how it is judged."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Batch, Recipe], Tensor],
        recipe: Recipe,
        evaluate: Callable[[], Mapping[str, float]] | None,
    ) -> None:
        super().__init__()
        self.model = model
        self._loss, self._recipe, self._evaluate = loss, recipe, evaluate

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(self.model, batch, self._recipe)

    @torch.no_grad()
    def evaluate(self) -> Mapping[str, float]:
        assert self._evaluate is not None
        self.eval()
        metrics = self._evaluate()
        self.train()
        return metrics


def train(
    model: nn.Module,
    data: Dataset[Any],
    recipe: Recipe,
    folder: str | Path,
    *,
    save: Callable[[], None],
    collate: Callable[[list[Any]], Batch] | None = None,
    loss: Callable[[nn.Module, Batch, Recipe], Tensor] = suffix_loss,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    settings: Mapping[str, Any] | None = None,
    restart: bool = False,
    tensorboard: bool = False,
) -> None:
    """Minimise a loss over data, writing `log.jsonl` and checkpoints to a folder; a run that was cut off goes on by itself.

    A killed run that goes on ends at the very weights of one that was not, where the arithmetic is deterministic. The model
    computes in the recipe's precision and is left in it; its place (CPU, GPU) is its own. With several processes, see `parallel`,
    parameters and optimizer are spread over them, and a step takes the same examples as with one.

    Args:
        data: a map-style dataset, of a known length, whose items depend on their index alone. It is shuffled anew in every epoch
            by the recipe's seed, unless it has an attribute `shuffle` that is False: then it is read once, in order. An attribute
            `fingerprint`, a string, tells a run's data from other data when the run is to go on.
        save: writes the trained model; called once, at the end, by the first process.
        collate: makes a batch of a list of items, in the workers. Without it each item is a whole (micro) batch.
        loss: the mean loss of a batch, a scalar. Means of micro batches are weighted by their numbers of examples (or, as
            `loss_reduction` has it, tokens) that `labels` [B, S] count.
        evaluate: metrics of the model as it is; "loss" is what patience looks at. Called before the first step, as `eval_every`
            says, and at the end, in evaluation mode, without gradients, by every process for all of the data.
        settings: what else makes a run another one, as JSON has it.
        restart: throw the folder's checkpoint away instead of going on from it.
        tensorboard: write TensorBoard's event files to the folder, too.

    Raises:
        ValueError: the checkpoint is of another recipe or other data, or the recipe does not fit the model or the data.
        RuntimeError: a loss is no finite number; the last checkpoint is kept. Or a package or torch lacks what is asked for.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    steps = count_steps(data, recipe, whole_batches=collate is None)
    micro_batch_size(recipe)
    if recipe.patience is not None and evaluate is None:
        raise ValueError("patience: needs data to evaluate on")
    if recipe.compile and parallel.world() > 1:
        raise ValueError("compile: not with several processes")
    if tensorboard and find_spec("tensorboard") is None:
        raise RuntimeError("TensorBoard's files need the package `tensorboard`")
    freeze(model, recipe.frozen)
    task = _Task(model, loss, recipe, evaluate).train()
    dtype = PRECISIONS[recipe.precision]
    parallel.shard_(task, layers(model), dtype, "evaluate")
    weights = Weights(model, dtype)
    optimizers = build_optimizers(model, weights, recipe)
    recipe_and_data = {"recipe": asdict(recipe), "data": [len(data), getattr(data, "fingerprint", None)]}  # type: ignore[arg-type]
    state = State(folder, {**recipe_and_data, "settings": settings or {}}, weights, optimizers, restart=restart)
    compute = torch.compile(task, dynamic=True) if recipe.compile else task

    with (
        checkpointed_layers(model) if recipe.gradient_checkpointing else nullcontext(),
        Log(folder, after=state.step, tensorboard=tensorboard) as log,
        tqdm(
            total=steps,
            initial=state.step,
            unit="step",
            mininterval=1,
            smoothing=0.05,
            disable=None if parallel.rank() == 0 else True,
        ) as bar,
    ):

        def judge() -> bool:
            """Evaluate, and tell whether patience is at its end."""
            metrics = parallel.of_the_first(dict(task.evaluate()))
            parallel.reshard(task)
            log.write(state.step, "evaluation", metrics)
            if parallel.rank() == 0:
                values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
                bar.write(f"step {state.step}: {values}", file=sys.stderr)
            return recipe.patience is not None and state.judge(metrics["loss"], recipe.patience)

        if evaluate is not None and state.step == 0:
            judge()
        average: float | None = None
        started = time.perf_counter()
        for batches in [] if state.stopped else read(data, recipe, collate, range(state.step, steps), weights.device):
            rate = recipe.learning_rate * learning_rate_factor(state.step, steps, recipe)
            mean, norm = _gradients(compute, batches, weights, recipe)
            if not math.isfinite(mean + norm):
                raise RuntimeError(
                    f"step {state.step + 1}: the loss is {mean} and its gradient's norm {norm}; the weights are left as they "
                    "were. A lower learning rate or a longer warm-up may help"
                )
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
            weights.put()
            state.step += 1
            seconds = time.perf_counter() - started
            measured = {"loss": mean, "learning_rate": rate, "gradient_norm": norm}
            speed = {"examples_per_second": recipe.batch_size / seconds, "seconds": seconds}
            log.write(state.step, "train", measured | speed)
            average = mean if average is None else average + 0.02 * (mean - average)
            bar.set_postfix(loss=f"{average:.4f}", lr=f"{rate:.2e}", refresh=False)
            bar.update()
            last = state.step == steps
            if evaluate is not None and (last or recipe.eval_every and state.step % recipe.eval_every == 0):
                last |= judge()
            if last or state.step % recipe.save_every == 0:
                state.save()
            if last:
                break
            started = time.perf_counter()
    if recipe.patience is not None:
        state.load_best()
    parallel.unshard_(task, dtype)
    if parallel.rank() == 0:
        model.eval()
        save()
        state.remove()
    parallel.wait()


def _gradients(
    compute: Callable[[Batch], Tensor], batches: Sequence[Batch], weights: Weights, recipe: Recipe
) -> tuple[float, float]:
    """Leave a step's clipped gradient with the masters, and give its loss and the gradient's norm."""
    shares = [share(batch, recipe) for batch in batches]
    # FSDP averages the gradients of the processes.
    whole = max(1, parallel.total(sum(shares), weights.device)) / parallel.world()
    losses = []
    for batch, part in zip(batches, shares, strict=True):
        loss = compute({name: tensor.to(weights.device, non_blocking=True) for name, tensor in batch.items()})
        loss = loss * (part / whole)
        loss.backward()
        weights.take_gradients()
        losses.append(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_(weights.masters.values(), recipe.clip)
    # Both at once, the only time in a step that the device is waited for.
    mean, length = torch.stack((torch.stack(losses).sum().float(), parallel.full(norm))).tolist()
    return parallel.total(mean, weights.device) / parallel.world(), length


def micro_batch_size(recipe: Recipe) -> int:
    """Give the examples of a process's forward pass; ValueError when they cannot be the same number for all."""
    size = recipe.micro_batch or max(1, recipe.batch_size // parallel.world())
    if recipe.batch_size % (size * parallel.world()):
        raise ValueError(
            f"batch_size: {recipe.batch_size} examples in micro batches of {size} are not for {parallel.world()} processes"
        )
    return size


def count_steps(data: Dataset[Any], recipe: Recipe, *, whole_batches: bool = False) -> int:
    """Give the steps of a run; ValueError when the data are empty, or read in order and not enough."""
    examples = len(data) * (micro_batch_size(recipe) if whole_batches else 1)  # type: ignore[arg-type]
    if examples == 0:
        raise ValueError("data: there are no examples")
    steps = recipe.steps if recipe.epochs is None else math.ceil(recipe.epochs * examples / recipe.batch_size)
    assert steps is not None
    if not getattr(data, "shuffle", True) and steps * recipe.batch_size > examples:
        raise ValueError(
            f"data: {steps} steps of {recipe.batch_size} examples are wanted, but there are {examples} to read once"
        )
    return steps


def read(
    data: Dataset[Any],
    recipe: Recipe,
    collate: Callable[[list[Any]], Batch] | None,
    steps: range,
    device: torch.device,
) -> Iterator[list[Batch]]:
    """Give this process's micro batches of each of these steps; what earlier steps took is skipped without being read."""
    size = micro_batch_size(recipe)
    count = recipe.batch_size // size
    n, shuffle = len(data), getattr(data, "shuffle", True)  # type: ignore[arg-type]

    def chunks() -> Iterator[Any]:
        order = _order(n, recipe.seed, shuffle, steps.start * (count if collate is None else recipe.batch_size))
        for index in range(count * len(steps)):
            chunk = next(order) if collate is None else list(itertools.islice(order, size))
            if index % parallel.world() == parallel.rank():
                yield chunk

    indices: Any = chunks()
    loader = DataLoader(
        data,
        batch_size=None if collate is None else 1,
        sampler=indices if collate is None else None,
        batch_sampler=None if collate is None else indices,
        collate_fn=collate,
        num_workers=recipe.workers,
        prefetch_factor=4 if recipe.workers else None,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(recipe.seed),
    )
    batches = iter(loader)
    for _ in steps:
        yield list(itertools.islice(batches, count // parallel.world()))


def _order(n: int, seed: int, shuffle: bool, first: int) -> Iterator[int]:
    """All indices of the epochs one after another, from the `first`-th on."""
    for epoch in itertools.count(first // n):
        indices = np.random.default_rng((seed, epoch)).permutation(n).tolist() if shuffle else range(n)
        yield from indices[first % n if epoch == first // n else 0 :]


def share(batch: Batch, recipe: Recipe) -> int:
    """What a micro batch counts: its examples with labels, or its labels; 1 where there are none to count."""
    if "labels" not in batch:
        return 1
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    return int(counts.sum() if recipe.loss_reduction == "token" else (counts > 0).sum())


def layers(model: nn.Module) -> list[nn.Module]:
    """All layers of the image encoder and of the language model, adapted or not."""
    lists = [module for name, module in model.named_modules() if name.split(".")[-1] == "layers"]
    return [layer for found in lists if isinstance(found, nn.ModuleList) for layer in found]


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Keep only the inputs of the model's layers for the backward pass, which computes the rest anew.

    Source: Chen et al., https://arxiv.org/abs/1604.06174.
    """
    found: list[Any] = layers(model)
    for layer in found:
        layer.forward = partial(_recomputed, layer.forward)
    try:
        yield
    finally:
        for layer in found:
            del layer.forward


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        # `checkpoint` looks at random states even then, which is not allowed while a CUDA graph is captured.
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
