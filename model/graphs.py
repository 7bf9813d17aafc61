"""Functions of tensors that stay where they are, as CUDA graphs: one launch instead of hundreds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from pg_kernels import backends
from pg_kernels.ops.int8_linear import PackedInt8Weight

KEPT = 4
"""How many sessions a model keeps, and a session prefills: each holds memory."""
Kept = TypeVar("Kept")


class Recorder:
    """Captures the graphs of one session: all draw from one generator, and share memory, as no two of them run at once."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator
        self._pool: Any = None

    def capture(self, function: Callable[[], None]) -> Any:
        """Record a function's launches as a `torch.cuda.CUDAGraph`, without running them."""
        graph = capture(function, self._generator, self._pool)
        self._pool = graph.pool()
        return graph


class Replayed:
    """A function without a result, of tensors that stay where they are: it gets the same arguments every time.

    The first call runs it, which also sets up whatever kernels need; the second captures it as a CUDA graph, which from then on
    is replayed. A function that is called once is never captured: that would take longer than the call.
    """

    def __init__(self, function: Callable[..., None], recorder: Recorder) -> None:
        self._function, self._recorder = function, recorder
        self._graph: Any = None
        self._warm = False

    def __call__(self, *arguments: Any) -> None:
        if not self._warm:
            self._function(*arguments)
            self._warm = True
            return
        if self._graph is None:
            self._graph = self._recorder.capture(partial(self._function, *arguments))
        self._graph.replay()


_capturing = threading.Lock()
"""A capture begins with a wait for the device, which the capture of another thread does not survive."""


def capture(function: Callable[[], None], generator: torch.Generator | None, pool: Any) -> Any:
    """Record a function's launches on the current device; each replay draws anew from `generator`.

    Intermediate results take memory of `pool`, if another graph has one to share.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    # Of its own stream torch has one for all devices. Other threads may go on allocating memory.
    stream = _stream(torch.cuda.current_device())
    with _capturing, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        function()
    return graph


@cache
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Shelf(Generic[Kept]):
    """The last few things that were put back, by key; whoever takes one has it alone."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()

    def take(self, key: Hashable) -> Kept | None:
        """Take away what was put back under a key last, if it is still there."""
        return self._kept.pop(key, None)

    def put(self, key: Hashable, thing: Kept) -> None:
        """Put back; what was put back longest ago goes when there are more than `KEPT`."""
        self._kept[key] = thing
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)


class GraphCache(Shelf[Kept]):
    """What a model keeps between calls of `generate`, as long as it is the same model; copies and pickles of it are empty."""

    _fingerprint: tuple[object, ...] = ()

    def of(self, model: nn.Module) -> GraphCache[Kept]:
        """This, emptied if the model's tensors have moved or its modules changed since."""
        fingerprint = _fingerprint(model)
        if fingerprint != self._fingerprint:
            self.clear()
            self._fingerprint = fingerprint
        return self

    def __deepcopy__(self, memo: object) -> GraphCache[Kept]:
        return GraphCache()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return GraphCache, ()


def capture_unsupported_reason(model: nn.Module, device: torch.device) -> str | None:
    """Why a model's generation cannot be captured on a device, or None when it can."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if torch.is_autocast_enabled(device.type):
        return "autocast keeps casts of the weights only as long as it lasts"
    for module in _modules(model):
        kind = type(module)
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a {kind.__name__} has a forward hook, which a graph would not call"
        # What an adapter's layer does may change with numbers and switches that are no tensors.
        package, _, rest = kind.__module__.partition(".")
        if package not in ("torch", "pg_kernels") or rest.startswith("integrations."):
            return f"there is a {kind.__name__}, of which a graph might miss changes"
    return None


def _fingerprint(model: nn.Module) -> tuple[object, ...]:
    """What a captured graph depends on: where every number is, which modules there are, and what runs them."""
    found: list[object] = [
        backends.requested(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.are_deterministic_algorithms_enabled(),
    ]
    for module in _modules(model):
        found += (type(module), module.training)
        found += [tensor.data_ptr() for tensor in module._parameters.values() if tensor is not None]
        found += [tensor.data_ptr() for tensor in module._buffers.values() if tensor is not None]
        weight = vars(module).get("weight")
        if isinstance(weight, PackedInt8Weight):
            found += weight.data_ptrs()
    return tuple(found)


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules: `model.modules()` in a third of its time, which each call of `generate` takes before the first launch."""
    found = [model]
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return found
