"""The training loop: optimizers over fp32 masters, gradient accumulation, exact resuming, evaluation and logs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from pg_kernels.backends import backend, requested

from . import parallel
from .interruption import Interrupted, Signals
from .loading import Batch, Collate, count_steps, micro_batch_size, read, share
from .lock import exclusive
from .log import Log
from .optimization import Weights, build_optimizers, freeze
from .progress import Progress
from .recipe import Recipe, learning_rate_factor
from .state import State, run_identity

# What a process may request of all processes between two steps. The largest number wins; a signal's number is added to _STOP.
_SAVE, _STOP, _FAILED = 1, 1 << 8, 1 << 16


def suffix_loss(model: nn.Module, batch: Batch, recipe: Recipe) -> Tensor:
    """Return the model's loss on the suffixes.

    A batch with `image_index` (int64, one index for each image of the batch) holds each distinct image once in `pixel_values`, so
    that it is encoded once.
    """
    inputs: dict[str, Any] = dict(batch)
    index = inputs.pop("image_index", None)
    if index is not None:
        network: Any = model
        inputs["image_features"] = network.get_image_features(inputs.pop("pixel_values"))[index]
    return model(**inputs, loss_reduction=recipe.loss_reduction, label_smoothing=recipe.label_smoothing).loss


class _Task(nn.Module):
    """A model, the loss to minimise, and the evaluation."""

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

    @property
    def judged(self) -> bool:
        """Whether there is an evaluation."""
        return self._evaluate is not None

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
    collate: Collate | None = None,
    loss: Callable[[nn.Module, Batch, Recipe], Tensor] = suffix_loss,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    settings: Mapping[str, Any] | None = None,
    restart: bool = False,
    tensorboard: bool = False,
) -> None:
    """Minimise a loss over data, writing `log.jsonl` and checkpoints to a folder. An interrupted run continues.

    Where arithmetic is deterministic, a killed and continued run ends with exactly the weights of an uninterrupted one. The model
    computes in the recipe's precision on its own device, and is left in that precision. With several processes (see `parallel`)
    parameters and optimizer are sharded, and a step takes the same examples as with one process.

    Args:
        data: a map-style dataset of known length whose items depend on their index alone. It is shuffled in every epoch with the
            recipe's seed, unless it has an attribute `shuffle` that is False; then it is read once, in order. An attribute
            `fingerprint`, a string, identifies the data when a run continues.
        save: writes the trained model; called once, at the end, by the first process.
        collate: makes a batch of a list of items, in the workers. Without it, each item is a whole (micro) batch.
        loss: returns the mean loss of a batch, a scalar. Micro batches are weighted by their number of examples (or tokens, by
            `loss_reduction`) with labels in `labels` [B, S].
        evaluate: returns metrics of the model; patience watches "loss". Called before the first step, every `eval_every` steps
            and at the end, in evaluation mode, without gradients, by every process for all of the data.
        settings: further settings that identify a run, as JSON values.
        restart: discard the folder's checkpoint instead of continuing from it.
        tensorboard: write TensorBoard's event files to the folder, too.

    Raises:
        ValueError: the checkpoint has another recipe or other data, or the recipe does not fit the model or the data.
        RuntimeError: a loss is not finite (the last checkpoint is kept), or a package or torch lacks a feature.
        OSError: the folder cannot be written, or another run is writing to it.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; a checkpoint holds all steps. Only the main thread handles signals.
    """
    folder = Path(folder)
    with exclusive(folder):
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
        dtype = getattr(torch, recipe.precision)
        parallel.shard_(task, layers(model), dtype, "evaluate")
        weights = Weights(model, dtype)
        optimizers = build_optimizers(model, weights, recipe)
        state = State(folder, run_identity(data, recipe, settings or {}), weights, optimizers, restart=restart)
        with (
            Log(folder, state, tensorboard=tensorboard) as log,
            Progress(state.step, steps) as progress,
            Signals() as signals,
        ):
            run = _Run(task, recipe, state, steps, log, progress, signals)
            with checkpointed_layers(model) if recipe.gradient_checkpointing else nullcontext():
                run.train(read(data, recipe, collate, range(state.step, steps), weights.device))
            if recipe.patience is not None:
                state.load_best()
            parallel.unshard_(task, dtype)
            if parallel.rank() == 0:
                model.eval()
                run.finish(save)
        parallel.wait()


class _Run:
    """The steps of a run. Requests to stop are handled between two steps, where a checkpoint holds everything."""

    def __init__(
        self, task: _Task, recipe: Recipe, state: State, steps: int, log: Log, progress: Progress, signals: Signals
    ) -> None:
        self._task, self._recipe, self._state, self._steps = task, recipe, state, steps
        self._log, self._progress, self._signals = log, progress, signals
        self._compute = torch.compile(task, dynamic=True) if recipe.compile else task
        self._saved_step, self._saved_time = state.step, time.monotonic()
        self._reported: set[str] = set()

    def train(self, data: Iterator[list[Batch]]) -> None:
        """Take the remaining steps, with the micro batches of each, and evaluate in between."""
        state = self._state
        while True:
            if self._evaluation_is_due():
                self._judge()
            if state.stopped or state.step == self._steps:
                break
            started = time.perf_counter()
            try:
                batches = next(data)
            except Exception:
                self._settle(failed=True)
                raise
            waited = time.perf_counter() - started
            skipped = self._settle(skipped=self._report_skipped(batches))
            self._step(batches, skipped, time.perf_counter() - waited)
        state.save()
        if state.skipped:
            self._log.write(state.step, "skipped", {"examples": state.skipped})
            self._progress.write(f"{state.skipped} examples were skipped: an image of theirs could not be read")

    def finish(self, save: Callable[[], None]) -> None:
        """Write the result, then delete the checkpoint."""
        try:
            with self._at_once():
                save()
        except Interrupted as interruption:
            raise self._interrupted(interruption.signum) from None
        self._state.remove()

    def _step(self, batches: list[Batch], skipped: int, started: float) -> None:
        state, recipe, weights = self._state, self._recipe, self._state.weights
        rate = recipe.learning_rate * learning_rate_factor(state.step, self._steps, recipe)
        mean, norm = _gradients(self._compute, batches, weights, recipe)
        if not math.isfinite(mean + norm):
            raise RuntimeError(
                f"step {state.step + 1}: the loss is {mean} and its gradient's norm {norm}; the weights are left as they "
                "were. A lower learning rate or a longer warm-up may help"
            )
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        weights.put()
        state.step += 1
        state.skipped += skipped
        seconds = time.perf_counter() - started
        values = {
            "loss": mean,
            "learning_rate": rate,
            "gradient_norm": norm,
            "examples_per_second": recipe.batch_size / seconds,
            "seconds": seconds,
        }
        self._log.write(state.step, "train", values | ({"skipped": skipped} if skipped else {}))
        self._progress.update(state.step, mean, rate)

    def _evaluation_is_due(self) -> bool:
        step, every = self._state.step, self._recipe.eval_every
        due = step in (0, self._steps) or every is not None and step % every == 0
        return due and self._task.judged and self._state.evaluated != step

    def _judge(self) -> None:
        """Evaluate. Return whether patience has run out."""
        state, patience = self._state, self._recipe.patience
        try:
            with self._at_once():
                metrics = dict(self._task.evaluate())
        except Interrupted:
            self._settle()
            raise
        except Exception:
            self._settle(failed=True)
            raise
        metrics = parallel.of_the_first(metrics)
        parallel.reshard(self._task)
        self._log.write(state.step, "evaluation", metrics)
        self._progress.write(f"step {state.step}: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
        state.evaluated = state.step
        if patience is not None:
            state.judge(metrics["loss"], patience)

    def _at_once(self) -> AbstractContextManager[None]:
        """Let a signal interrupt an evaluation, which does not change weights. Several processes would wait for each other."""
        return self._signals.at_once() if parallel.world() == 1 else nullcontext()

    def _settle(self, *, failed: bool = False, skipped: int = 0) -> int:
        """Save or stop if any process requests it. Return the sum of all processes' `skipped`."""
        state, recipe, signum = self._state, self._recipe, self._signals.received
        wish = _FAILED if failed else _STOP + signum if signum else 0
        if not wish and state.step != self._saved_step:
            minutes = (time.monotonic() - self._saved_time) / 60
            wish = _SAVE if state.step % recipe.save_every == 0 or minutes >= recipe.save_minutes else 0
        wishes, counts = zip(*parallel.gather((wish, skipped), state.weights.device), strict=True)
        wish = max(wishes)
        if wish:
            state.unreadable = wish == _FAILED
            state.save()
            self._saved_step, self._saved_time = state.step, time.monotonic()
        if wish == _FAILED and not failed:
            raise RuntimeError("another process could not go on; it says why")
        if _STOP < wish < _FAILED:
            raise self._interrupted(wish - _STOP)
        return sum(counts)

    def _interrupted(self, signum: int) -> Interrupted:
        state = self._state
        return Interrupted(signum, f": stopped after step {state.step} of {self._steps}, which {state.path} holds")

    def _report_skipped(self, batches: list[Batch]) -> int:
        """Remove the reasons for skipped examples from the batches, print new ones, and return their number."""
        found: list[str] = [problem for batch in batches for problem in batch.pop("skipped", ())]  # type: ignore[misc]
        for problem in dict.fromkeys(found):
            if problem not in self._reported:
                self._reported.add(problem)
                self._progress.write(f"skipped {problem}", every_process=True)
        return len(found)


def _gradients(
    compute: Callable[[Batch], Tensor], batches: Sequence[Batch], weights: Weights, recipe: Recipe
) -> tuple[float, float]:
    """Compute a step's clipped gradient in the master weights. Return the loss and the gradient's norm."""
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
    # Copy both to the host together: this is the only device synchronisation of a step.
    mean, length = torch.stack((torch.stack(losses).sum().float(), parallel.full(norm))).tolist()
    return parallel.total(mean, weights.device) / parallel.world(), length


def layers(model: nn.Module) -> list[nn.Module]:
    """Return all layers of the image encoder and the language model, with or without adapters."""
    lists = [module for name, module in model.named_modules() if name.split(".")[-1] == "layers"]
    return [layer for found in lists if isinstance(found, nn.ModuleList) for layer in found]


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Store only the inputs of the model's layers for the backward pass, which recomputes the rest.

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
        # `checkpoint` reads random states even without gradients, which is not allowed during the capture of a CUDA graph.
        return forward(*args, **kwargs)
    return checkpoint(_on_backend, requested(), forward, *args, use_reentrant=False, **kwargs)


def _on_backend(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a forward on the backend of its first run: autograd's GPU thread, which recomputes it, has no backend setting."""
    with backend(name):
        return forward(*args, **kwargs)
