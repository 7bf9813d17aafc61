"""A training run's state: its checkpoint, and the best weights."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import parse_json, temporary_sibling, unreadable
from . import parallel
from .optimization import Weights
from .recipe import Recipe

CHECKPOINT = "checkpoint.safetensors"
BEST = "best.safetensors"

# Fields of a recipe that do not affect the weights.
_DO_NOT_MATTER = ("workers", "save_every", "save_minutes")
IMAGES = "the images' content"
"""The setting that may differ after a run has stopped at an unreadable image."""
_FIELDS = ("step", "best", "stale", "stopped", "evaluated", "skipped")
_DAMAGE = (SafetensorError, KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError)
_ADVICE = "put a good copy there, or start anew with --restart (restart=True)"


def run_identity(data: Any, recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that identify a run, as JSON values."""
    kinds = {"recipe": asdict(recipe), "data": [len(data), getattr(data, "fingerprint", None)], "settings": settings}
    return json.loads(json.dumps(kinds))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describe how one run's `run_identity` differs from another's."""
    ignored = {*_DO_NOT_MATTER, *([IMAGES] if old.get("unreadable") else [])}
    found = []
    for kind in ("recipe", "settings"):
        for name in sorted({*old[kind], *new[kind]} - ignored):
            before, now = old[kind].get(name), new[kind].get(name)
            if before != now:
                found.append(f"{name} was {before}, is {now}")
    if old["data"] != new["data"]:
        found.append("the data are other ones")
    return found


class State:
    """All that a run needs to continue, stored in one file that is replaced atomically.

    The constructor restores the folder's checkpoint, if there is one and not `restart`. Raises ValueError if it is another run's.
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
        """The number of evaluations since the best one."""
        self.stopped = False
        self.evaluated = -1
        """The step of the last evaluation."""
        self.skipped = 0
        """The number of examples left out because an image could not be read."""
        self.unreadable = False
        """Whether the run stopped at unreadable data, which may be repaired before it continues."""
        self.resumed = False
        torch.manual_seed(identity["recipe"]["seed"])
        if restart and parallel.rank() == 0:
            self.remove()
        parallel.wait()
        if self.path.is_file():
            self._load()

    def judge(self, loss: float, patience: int) -> bool:
        """Store the weights if they are the best so far. Return whether patience has run out."""
        if self.best is None or loss < self.best:
            self.best, self.stale = loss, 0
            _save(self._best, self.weights.masters.items(), {})
        else:
            self.stale += 1
        self.stopped = self.stale >= patience
        return self.stopped

    def load_best(self) -> None:
        """Restore the best weights."""
        with self._open_best() as file:
            self.weights.load(file.get_tensor)

    def remove(self) -> None:
        """Delete the checkpoint and the best weights."""
        for path in (self.path, self._best):
            path.unlink(missing_ok=True)

    def save(self) -> None:
        """Write the checkpoint."""
        rest = {
            **{name: getattr(self, name) for name in _FIELDS},
            "unreadable": self.unreadable,
            "random": random.getstate(),
            "tensors": sum(1 for _ in self._tensors()),
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
                rest = parse_json(file.metadata()["state"])
                found = differences(rest, self.identity)
                if not found:
                    if not all(isinstance(rest[name], int) for name in ("step", "stale", "evaluated", "skipped")):
                        raise TypeError("expected whole numbers")
                    if rest["tensors"] != len(list(file.keys())):
                        raise ValueError(f"expected {rest['tensors']} tensors, got {len(list(file.keys()))}")
                    for name in _FIELDS:
                        setattr(self, name, rest[name])
                    self._load_tensors(file)
                    version, words, gauss = rest["random"]
                    random.setstate((version, tuple(words), gauss))
        except torch.OutOfMemoryError:
            raise
        except _DAMAGE as error:
            raise unreadable(self.path, "a checkpoint of a training run", f"{str(error)[:150]}; {_ADVICE}") from error
        if found:
            raise ValueError(
                f"{self.path} is of another run: {'; '.join(found)}. Go on as it was, restart, or use another folder"
            )
        if self.best is not None:
            with self._open_best():
                pass
        self.resumed = True

    @contextmanager
    def _open_best(self) -> Iterator[Any]:
        if not self._best.is_file():
            raise FileNotFoundError(f"{self._best}, the run's best weights, does not exist; {_ADVICE}")
        try:
            with safe_open(self._best, framework="pt") as file:
                if missing := self.weights.masters.keys() - set(file.keys()):
                    raise ValueError(f"it lacks {min(missing)}")
                yield file
        except _DAMAGE as error:
            raise unreadable(self._best, "the run's best weights", f"{str(error)[:150]}; {_ADVICE}") from error

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


def _save(path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str]) -> None:
    """Gather tensors from all processes and write them to a file from the first process."""
    found = {}
    for name, tensor in tensors:
        whole = parallel.full(tensor)
        if parallel.rank() == 0:
            found[name] = whole.cpu().contiguous()
    problem = None
    if parallel.rank() == 0:
        try:
            with temporary_sibling(
                path
            ) as folder:  # safetensors writes to its own temporary file, which a kill leaves behind
                folder.mkdir()
                save_file(found, folder / path.name, metadata)
                with (folder / path.name).open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(folder / path.name, path)
        except OSError as error:
            problem = error
    if problem := parallel.of_the_first(problem):
        raise problem
