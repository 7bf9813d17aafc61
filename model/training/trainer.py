"""The training loop: optimizers over fp32 masters, gradient accumulation, exact resuming, evaluation and logs."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..files import temporary_sibling, unreadable, write_atomically

Batch: TypeAlias = dict[str, Tensor]

SCHEDULES = ("cosine", "linear", "rsqrt")
REDUCTIONS = ("example", "token")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPTIMIZERS = ("adamw", "muon")

CHECKPOINT = "checkpoint.safetensors"
BEST = "best.safetensors"
LOG = "log.jsonl"

_DO_NOT_MATTER = ("workers", "save_every")  # fields of a recipe that leave the weights as they are


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on besides model and data; the defaults are those of PaliGemma's transfers.

    The fields' documentation is their `metadata["help"]`, which command lines show. Raises ValueError naming the field.
    """

    steps: int | None = _option(None, "optimizer steps; or give epochs")
    epochs: float | None = _option(None, "passes over the data; or give steps")
    batch_size: int = _option(32, "examples a step, over all processes")
    micro_batch: int | None = _option(None, "examples a forward pass, when memory is short; gradients are accumulated")
    learning_rate: float = _option(1e-5, "the highest one")
    schedule: str = _option("cosine", "how it falls after the warm-up: cosine and linear to 0", choices=SCHEDULES)
    warmup: float = _option(0.05, "share of all steps in which the learning rate rises")
    weight_decay: float = _option(0.0, "decoupled, of matrices and embeddings; biases and norms have none")
    betas: tuple[float, float] = _option((0.9, 0.999), "of AdamW")
    clip: float = _option(1.0, "largest norm of the gradient; inf for no limit")
    label_smoothing: float = _option(0.0, "share of the probability that the loss spreads over the vocabulary")
    loss_reduction: str = _option(
        "example", "example: mean over each answer's tokens first, as big_vision; token: over all", choices=REDUCTIONS
    )
    frozen: tuple[str, ...] = _option(
        (), "parts to leave as they are, by name: vision_tower, language_model.layers.0, …"
    )
    precision: str = _option("float32", "of the arithmetic; the optimizer always moves fp32", choices=tuple(PRECISIONS))
    gradient_checkpointing: bool = _option(
        False, "compute layers anew in the backward pass: less memory, a third more time"
    )
    compile: bool = _option(False, "torch.compile the loss: a slow start, faster steps")
    eval_every: int | None = _option(None, "steps between evaluations; without it, only at the end")
    save_every: int = _option(500, "steps between checkpoints")
    patience: int | None = _option(
        None, "stop after so many evaluations without a lower loss, and keep the best weights"
    )
    seed: int = _option(0, "of the order of the data")
    workers: int = _option(1, "processes that prepare batches; 0 for none")
    optimizer: str = _option(
        "adamw", "muon: orthogonalised momentum for hidden matrices, AdamW for the rest", choices=OPTIMIZERS
    )

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps and epochs: give one of them, got {self.steps} and {self.epochs}")
        for name in ("steps", "epochs", "batch_size", "micro_batch", "clip", "eval_every", "save_every", "patience"):
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
    """Give the share of the highest learning rate at a step: a linear warm-up to 1, then the schedule.

    "rsqrt" falls with the square root of the steps done, whatever their number, from 1 at the warm-up's end.
    """
    warmup = max(1, round(recipe.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    if recipe.schedule == "rsqrt":
        return math.sqrt(warmup / (step + 1))
    done = (step - warmup) / max(1, steps - warmup)
    return 1 - done if recipe.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)


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
    restart: bool = False,
    tensorboard: bool = False,
) -> None:
    """Minimise a loss over data, writing `log.jsonl` and checkpoints to a folder; a run that was cut off goes on by itself.

    A killed run that goes on ends at the very weights of one that was not, where the arithmetic is deterministic. The model
    computes in the recipe's precision and is left in it; its place (CPU, GPU) is its own.

    Args:
        data: a map-style dataset, of a known length, whose items depend on their index alone. It is shuffled anew in every epoch
            by the recipe's seed, unless it has an attribute `shuffle` that is False: then it is read once, in order. An attribute
            `fingerprint`, a string, tells a run's data from other data when the run is to go on.
        save: writes the trained model; called once, at the end.
        collate: makes a batch of a list of items, in the workers. Without it each item is a whole (micro) batch.
        loss: the mean loss of a batch, a scalar. Means of micro batches are weighted by their numbers of examples (or, as
            `loss_reduction` has it, tokens) that `labels` [B, S] count.
        evaluate: metrics of the model as it is; "loss" is what patience looks at. Called in evaluation mode, without gradients.
        restart: throw the folder's checkpoint away instead of going on from it.
        tensorboard: write TensorBoard's event files to the folder, too.

    Raises:
        ValueError: the checkpoint is of another recipe or other data, or the recipe does not fit the model or the data.
        RuntimeError: a loss is no finite number; the last checkpoint is kept.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    steps = count_steps(data, recipe, whole_batches=collate is None)
    if recipe.patience is not None and evaluate is None:
        raise ValueError("patience: needs data to evaluate on")
    freeze(model, recipe.frozen)
    weights = Weights(model.train(), PRECISIONS[recipe.precision])
    optimizers = build_optimizers(model, weights, recipe)
    identity = {"recipe": asdict(recipe), "data": [len(data), getattr(data, "fingerprint", None)]}  # type: ignore[arg-type]
    state = State(folder / CHECKPOINT, identity, weights, optimizers)
    torch.manual_seed(recipe.seed)
    if restart:
        state.path.unlink(missing_ok=True)
    elif state.path.is_file():
        state.load()
    device = next(iter(weights.parameters.values())).device

    def compute(batch: Batch) -> Tensor:
        return loss(model, batch, recipe)

    if recipe.compile:
        compute = torch.compile(compute, dynamic=True)

    with (
        checkpointed_layers(model) if recipe.gradient_checkpointing else nullcontext(),
        Log(folder, after=state.step, tensorboard=tensorboard) as log,
        tqdm(total=steps, initial=state.step, unit="step", mininterval=1, smoothing=0.05, disable=None) as bar,
    ):
        average: float | None = None
        started = time.perf_counter()
        for batches in [] if state.stopped else read(data, recipe, collate, range(state.step, steps), device):
            rate = recipe.learning_rate * learning_rate_factor(state.step, steps, recipe)
            shares = [share(batch, recipe) for batch in batches]
            losses = []
            for batch, part in zip(batches, shares, strict=True):
                inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                value = compute(inputs) * (part / max(1, sum(shares)))
                value.backward()
                weights.take_gradients()
                losses.append(value.detach())
            total_norm = torch.nn.utils.clip_grad_norm_(weights.masters.values(), recipe.clip)
            # Both at once, the only time in a step that the device is waited for.
            mean, norm = torch.stack((torch.stack(losses).sum().float(), total_norm)).tolist()
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
            now = time.perf_counter()
            seconds, started = now - started, now
            measured = {"loss": mean, "learning_rate": rate, "gradient_norm": norm}
            speed = {"examples_per_second": recipe.batch_size / seconds, "seconds": seconds}
            log.write(state.step, "train", measured | speed)
            average = mean if average is None else average + 0.02 * (mean - average)
            bar.set_postfix(loss=f"{average:.4f}", lr=f"{rate:.2e}", refresh=False)
            bar.update()
            last = state.step == steps
            if evaluate is not None and (last or recipe.eval_every and state.step % recipe.eval_every == 0):
                model.eval()
                with torch.no_grad():
                    metrics = evaluate()
                model.train()
                log.write(state.step, "evaluation", metrics)
                if recipe.patience is not None:
                    last |= state.judge(metrics["loss"], recipe.patience, folder / BEST)
                started = time.perf_counter()
            if last or state.step % recipe.save_every == 0:
                state.save()
            if last:
                break
    if recipe.patience is not None:
        weights.load(load_file(folder / BEST))
    model.eval()
    save()
    for name in (CHECKPOINT, BEST):
        (folder / name).unlink(missing_ok=True)


def count_steps(data: Dataset[Any], recipe: Recipe, *, whole_batches: bool = False) -> int:
    """Give the steps of a run; ValueError when the data are empty, or read in order and not enough."""
    examples = len(data) * (1 if not whole_batches else recipe.micro_batch or recipe.batch_size)  # type: ignore[arg-type]
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
    """Give the micro batches of each of these steps; what earlier steps took is skipped without being read."""
    size = recipe.micro_batch or recipe.batch_size
    accumulated = recipe.batch_size // size
    first = steps.start * accumulated
    last = steps.stop * accumulated
    order = _order(len(data), recipe.seed, getattr(data, "shuffle", True), first if collate is None else first * size)  # type: ignore[arg-type]
    indices: Iterable[Any] = itertools.islice(order, last - first)
    if collate is not None:
        indices = (list(itertools.islice(order, size)) for _ in range(first, last))
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
        yield list(itertools.islice(batches, accumulated))


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


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Let the parameters below modules of these names, such as `vision_tower` or `language_model.layers.0`, be as they are."""
    for part in parts:
        found = [parameter for name, parameter in model.named_parameters() if f".{part}." in f".{name}."]
        if not found:
            names = sorted({name.split(".")[i] for name, _ in model.named_parameters() for i in range(2)})
            raise ValueError(f"frozen: the model has no part {part!r}; it has {', '.join(names)} and what is in them")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("frozen: no parameter is left to train")


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Keep only the inputs of the model's layers for the backward pass, which computes the rest anew.

    Source: Chen et al., https://arxiv.org/abs/1604.06174.
    """
    lists = [module for name, module in model.named_modules() if name.split(".")[-1] == "layers"]
    layers: list[Any] = [layer for found in lists if isinstance(found, nn.ModuleList) for layer in found]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class Weights:
    """The parameters to train, by name, and the fp32 masters that an optimizer moves in their stead.

    In float32 they are the same. In bfloat16 the model computes in it, which leaves it so: on a CPU with bf16 instructions
    that takes two thirds of fp32's time (1.15 s against 1.73 s for 64 examples on one core), autocast more than both.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = self.parameters
        if dtype != torch.float32:  # before the rounding
            self.masters = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}
        model.to(dtype)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the parameters' gradients to the masters' in fp32, and leave them without."""
        if self.masters is self.parameters:
            return
        pairs = [
            (m, p) for m, p in zip(self.masters.values(), self.parameters.values(), strict=True) if p.grad is not None
        ]
        more = [(m.grad, p.grad) for m, p in pairs if m.grad is not None]
        if more:
            torch._foreach_add_(*map(list, zip(*more, strict=True)))
        for master, parameter in pairs:
            assert parameter.grad is not None
            if master.grad is None:
                master.grad = parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def put(self) -> None:
        """Round the masters into the parameters."""
        if self.masters is not self.parameters:
            torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take masters saved before."""
        for name, master in self.masters.items():
            master.copy_(tensors[name])
        self.put()


def build_optimizers(model: nn.Module, weights: Weights, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Give AdamW, and where the recipe wants it Muon for the hidden layers' matrices, over the masters.

    Muon's steps are scaled to AdamW's size, so that one learning rate fits both. Source: Jordan,
    https://kellerjordan.github.io/posts/muon/; Liu et al., https://arxiv.org/abs/2502.16982.
    """
    hidden: list[Tensor] = []
    if recipe.optimizer == "muon":
        tables = {
            id(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Embedding) or name.endswith("lm_head")
        }
        hidden = [
            weights.masters[name] for name, p in weights.parameters.items() if p.dim() == 2 and id(p) not in tables
        ]
    chosen = {id(master) for master in hidden}
    rest = [master for master in weights.masters.values() if id(master) not in chosen]
    groups = [
        {"params": [master for master in rest if master.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [master for master in rest if master.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        optimizers.append(torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True))
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


class State:
    """All that a run needs to go on: one file, so that there is always the old one or all of the new one."""

    def __init__(
        self,
        path: Path,
        identity: dict[str, Any],
        weights: Weights,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        self.path, self.identity, self.weights, self.optimizers = path, identity, weights, optimizers
        self.step = 0
        self.best: float | None = None
        self.stale = 0
        """Evaluations since the best one."""
        self.stopped = False
        for left in path.parent.glob(f".*.{path.name}"):  # by a run that was killed while it wrote
            left.unlink()

    def judge(self, loss: float, patience: int, best: Path) -> bool:
        """Keep the weights if they are the best so far; True when patience is at its end."""
        if self.best is None or loss < self.best:
            self.best, self.stale = loss, 0
            _save(best, dict(self.weights.masters), {})
        else:
            self.stale += 1
        self.stopped = self.stale >= patience
        return self.stopped

    def save(self) -> None:
        tensors = {f"weights/{name}": master for name, master in self.weights.masters.items()}
        for name, master in self.weights.masters.items():
            for optimizer in self.optimizers:
                for key, tensor in optimizer.state.get(master, {}).items():
                    tensors[f"optimizer/{name}/{key}"] = tensor
        tensors["random/torch"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        rest = {
            "step": self.step,
            "best": self.best,
            "stale": self.stale,
            "stopped": self.stopped,
            "random": random.getstate(),
            **self.identity,
        }
        _save(self.path, tensors, {"state": json.dumps(rest)})

    def load(self) -> None:
        """Go back to the file's state; ValueError when it is another run's."""
        try:
            with safe_open(self.path, framework="pt") as file:
                rest = json.loads(file.metadata()["state"])
            tensors = load_file(self.path)
        except (SafetensorError, KeyError, TypeError) as error:
            raise unreadable(self.path, "a checkpoint of a training run", error) from error
        self._check(rest)
        self.step, self.best, self.stale, self.stopped = (rest[key] for key in ("step", "best", "stale", "stopped"))
        self.weights.load({name: tensors[f"weights/{name}"] for name in self.weights.masters})
        for optimizer in self.optimizers:
            for master in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
                optimizer.state.pop(master, None)
        owners = {
            id(p): optimizer for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]
        }
        for key, tensor in tensors.items():
            if key.startswith("optimizer/"):
                _, name, entry = key.split("/")
                master = self.weights.masters[name]
                owners[id(master)].state[master][entry] = tensor.to(master.device)
        torch.set_rng_state(tensors["random/torch"])
        if torch.cuda.is_available() and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"])
        version, words, gauss = rest["random"]
        random.setstate((version, tuple(words), gauss))

    def _check(self, rest: Mapping[str, Any]) -> None:
        here = json.loads(json.dumps(self.identity))
        old, new = ({k: v for k, v in side["recipe"].items() if k not in _DO_NOT_MATTER} for side in (rest, here))
        differences = [f"{name} was {old.get(name)}, is {new.get(name)}" for name in new if old.get(name) != new[name]]
        if rest["data"] != here["data"]:
            differences.append("the data are other ones")
        if differences:
            raise ValueError(
                f"{self.path} is of another run: {'; '.join(differences)}. Go on as it was, restart, or use another folder"
            )


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    with temporary_sibling(path) as temporary:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


class Log:
    """`log.jsonl` with a line for every step and every evaluation, and TensorBoard's files where asked for."""

    def __init__(self, folder: Path, *, after: int, tensorboard: bool) -> None:
        path = folder / LOG
        old = path.read_text(encoding="utf-8").splitlines() if after and path.is_file() else []
        # Steps after the checkpoint are done again; the last line of a run that was killed may be half of one.
        kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= after]
        write_atomically(path, "".join(line + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=after + 1)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Add a line {"step", "kind", …}."""
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
