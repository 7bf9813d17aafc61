"""What a training run leaves in its folder: a checkpoint to go on from, the best weights, a log."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import temporary_sibling, unreadable, write_atomically
from . import parallel
from .optimization import Weights

CHECKPOINT = "checkpoint.safetensors"
BEST = "best.safetensors"
LOG = "log.jsonl"


_DO_NOT_MATTER = ("workers", "save_every")  # fields of a recipe that leave the weights as they are


class State:
    """All that a run needs to go on: one file, so that there is always the old one or all of the new one.

    Made, it has gone back to the folder's file if there is one, unless it is to `restart`; ValueError when that is another run's.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        weights: Weights,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        restart: bool,
    ) -> None:
        self.path, self._best = folder / CHECKPOINT, folder / BEST
        self.identity, self.weights, self.optimizers = identity, weights, optimizers
        self.step = 0
        self.best: float | None = None
        self.stale = 0
        """Evaluations since the best one."""
        self.stopped = False
        torch.manual_seed(identity["recipe"]["seed"])
        if parallel.rank() == 0:
            for name in (CHECKPOINT, BEST):
                for left in folder.glob(f".*.{name}"):  # by a run that was killed while it wrote
                    left.unlink()
            if restart:
                self.remove()
        parallel.wait()
        if self.path.is_file():
            self._load()

    def judge(self, loss: float, patience: int) -> bool:
        """Keep the weights if they are the best so far; True when patience is at its end."""
        if self.best is None or loss < self.best:
            self.best, self.stale = loss, 0
            _save(self._best, self.weights.masters.items(), {})
        else:
            self.stale += 1
        self.stopped = self.stale >= patience
        return self.stopped

    def load_best(self) -> None:
        """Go back to the best weights."""
        with safe_open(self._best, framework="pt") as file:
            self.weights.load(file.get_tensor)

    def remove(self) -> None:
        """Remove the files."""
        for path in (self.path, self._best):
            path.unlink(missing_ok=True)

    def save(self) -> None:
        """Write the file."""
        rest = {
            "step": self.step,
            "best": self.best,
            "stale": self.stale,
            "stopped": self.stopped,
            "random": random.getstate(),
            **self.identity,
        }
        _save(self.path, self._tensors(), {"state": json.dumps(rest)})

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self.weights.masters.items():
            yield f"weights/{name}", master
            for optimizer in self.optimizers:
                for key, tensor in optimizer.state.get(master, {}).items():
                    yield f"optimizer/{name}/{key}", tensor
        yield "random/torch", torch.get_rng_state()
        if self.weights.device.type == "cuda":
            yield "random/cuda", torch.cuda.get_rng_state()

    def _load(self) -> None:
        try:
            with safe_open(self.path, framework="pt") as file:
                rest = json.loads(file.metadata()["state"])
                self._check(rest)
                self._load_tensors(file)
        except (SafetensorError, KeyError, TypeError) as error:
            raise unreadable(self.path, "a checkpoint of a training run", error) from error
        self.step, self.best, self.stale, self.stopped = (rest[key] for key in ("step", "best", "stale", "stopped"))
        version, words, gauss = rest["random"]
        random.setstate((version, tuple(words), gauss))

    def _load_tensors(self, file: Any) -> None:
        self.weights.load(lambda name: file.get_tensor(f"weights/{name}"))
        owners = {
            id(p): optimizer for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]
        }
        keys: list[str] = list(file.keys())  # a handle is no dict
        for key in keys:
            if key.startswith("optimizer/"):
                _, name, entry = key.split("/")
                master, whole = self.weights.masters[name], file.get_tensor(key)
                part = torch.empty_like(master if whole.shape == master.shape else whole, device=master.device)
                parallel.copy_full_(part, whole)
                owners[id(master)].state[master][entry] = part
        torch.set_rng_state(file.get_tensor("random/torch"))
        if self.weights.device.type == "cuda":
            torch.cuda.set_rng_state(file.get_tensor("random/cuda"))

    def _check(self, rest: Mapping[str, Any]) -> None:
        here = json.loads(json.dumps(self.identity))
        differences = []
        for kind in ("recipe", "settings"):
            for name in sorted({*rest[kind], *here[kind]} - set(_DO_NOT_MATTER)):
                old, new = rest[kind].get(name), here[kind].get(name)
                if old != new:
                    differences.append(f"{name} was {old}, is {new}")
        if rest["data"] != here["data"]:
            differences.append("the data are other ones")
        if differences:
            raise ValueError(
                f"{self.path} is of another run: {'; '.join(differences)}. Go on as it was, restart, or use another folder"
            )


def _save(path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str]) -> None:
    """Write whole tensors, gathered from all processes, to a file, by the first one."""
    found = {}
    for name, tensor in tensors:
        whole = parallel.full(tensor)
        if parallel.rank() == 0:
            found[name] = whole.cpu().contiguous()
    if parallel.rank() == 0:
        with temporary_sibling(path) as temporary:
            save_file(found, temporary, metadata)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    parallel.wait()


class Log:
    """`log.jsonl` with a line for every step and every evaluation, and TensorBoard's files where asked for."""

    def __init__(self, folder: Path, *, after: int, tensorboard: bool) -> None:
        self._file: Any = None
        self._board: Any = None
        if parallel.rank() > 0:
            return
        path = folder / LOG
        old = path.read_text(encoding="utf-8").splitlines() if after and path.is_file() else []
        # Steps after the checkpoint are done again; the last line of a run that was killed may be half of one.
        kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= after]
        write_atomically(path, "".join(line + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=after + 1)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in (self._file, self._board):
            if opened is not None:
                opened.close()

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Add a line {"step", "kind", …}."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
