"""The examples of each step, and the worker processes that make batches of them."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import parallel
from .interruption import leave_signals_to_the_trainer
from .recipe import Recipe

Batch: TypeAlias = dict[str, Tensor]
Collate: TypeAlias = Callable[[list[Any]], Batch]


def micro_batch_size(recipe: Recipe) -> int:
    """Return the number of examples in a process's forward pass. Raises ValueError if processes cannot have equal numbers."""
    size = recipe.micro_batch or max(1, recipe.batch_size // parallel.world())
    if recipe.batch_size % (size * parallel.world()):
        raise ValueError(
            f"batch_size: {recipe.batch_size} examples in micro batches of {size} are not for {parallel.world()} processes"
        )
    return size


def count_steps(data: Dataset[Any], recipe: Recipe, *, whole_batches: bool = False) -> int:
    """Return the number of steps of a run. Raises ValueError if the data are empty, or too few to be read in order."""
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
    data: Dataset[Any], recipe: Recipe, collate: Collate | None, steps: range, device: torch.device
) -> Iterator[list[Batch]]:
    """Yield this process's micro batches of each step. Examples of earlier steps are skipped without being read."""
    size = micro_batch_size(recipe)
    count = recipe.batch_size // size
    n, shuffle = len(data), getattr(data, "shuffle", True)  # type: ignore[arg-type]

    def chunks() -> Iterator[Any]:
        order = _order(n, recipe.seed, shuffle, steps.start * (count if collate is None else recipe.batch_size))
        for index in range(count * len(steps)):
            chunk = next(order) if collate is None else list(itertools.islice(order, size))
            if index % parallel.world() == parallel.rank():
                yield chunk

    found = batches(data, chunks(), recipe, collate, pin_memory=device.type == "cuda")
    for _ in steps:
        yield list(itertools.islice(found, count // parallel.world()))


def batches(
    data: Dataset[Any], chunks: Iterable[Any], recipe: Recipe, collate: Collate | None, *, pin_memory: bool = False
) -> Iterator[Batch]:
    """Yield a batch for each chunk, made by the recipe's workers. A chunk is a list of indices, or one index without `collate`.

    An exception of a worker is raised here unchanged, without the worker's traceback.
    """
    loader = DataLoader(
        _Batches(data, collate),
        batch_size=None,
        sampler=chunks,
        num_workers=recipe.workers,
        prefetch_factor=4 if recipe.workers else None,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_trainer,
        generator=torch.Generator().manual_seed(recipe.seed),
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


class _Batches(Dataset[Any]):
    """Items are a chunk's batch, or the exception that it raised: DataLoader would put a worker's traceback into the message."""

    def __init__(self, data: Dataset[Any], collate: Collate | None) -> None:
        self._data, self._collate = data, collate

    def __getitem__(self, chunk: Any) -> Any:
        try:
            return self._data[chunk] if self._collate is None else self._collate([self._data[i] for i in chunk])
        except Exception as error:
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:
                return RuntimeError(f"{type(error).__name__}: {error}")
            return error


def _order(n: int, seed: int, shuffle: bool, first: int) -> Iterator[int]:
    """Yield example indices epoch after epoch, starting at position `first`."""
    for epoch in itertools.count(first // n):
        indices = np.random.default_rng((seed, epoch)).permutation(n).tolist() if shuffle else range(n)
        yield from indices[first % n if epoch == first // n else 0 :]


def share(batch: Batch, recipe: Recipe) -> int:
    """Return the weight of a micro batch: its number of examples with labels, or of labels; 1 without labels."""
    if "labels" not in batch:
        return 1
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    return int(counts.sum() if recipe.loss_reduction == "token" else (counts > 0).sum())
