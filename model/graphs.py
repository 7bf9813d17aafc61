"""Decoding as CUDA graphs: one launch instead of hundreds for each step."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from functools import cache, partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pg_kernels import backends
from pg_kernels.ops.int8_linear import PackedInt8Weight

from .decoding import DecodingSession, GenerativeModel, SamplingConfig

KEPT = 4
"""How many sessions a model keeps, and how many prefill graphs a session keeps. Each holds memory."""
T = TypeVar("T")


class Recorder:
    """Captures the graphs of one session. They draw from one generator, and share memory because no two run at once."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator
        self._pool: Any = None

    def capture(self, function: Callable[[], None]) -> Any:
        """Capture a function's launches as a `torch.cuda.CUDAGraph` without running them."""
        graph = capture(function, self._generator, self._pool)
        self._pool = graph.pool()
        return graph


class GraphedFunction:
    """A function without a result whose arguments are the same at every call, run as a CUDA graph.

    The first call runs the function, which also sets up its kernels. The second call captures it, and later calls replay the
    graph. A function that is called once is not captured: the capture takes longer than the call.
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
"""A capture starts by synchronising with the device, which would break another thread's capture."""


def capture(function: Callable[[], None], generator: torch.Generator | None, pool: Any) -> Any:
    """Capture a function's launches on the current device. Each replay draws new numbers from `generator`.

    Intermediate results use the memory pool of another graph, if `pool` is given.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    # torch's own capture stream is one for all devices. Other threads may go on allocating memory.
    stream = _stream(torch.cuda.current_device())
    with _capturing, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        function()
    return graph


@cache
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class LRUPool(Generic[T]):
    """The last `KEPT` objects that were put back, by key. A taken object is no longer in the pool."""

    def __init__(self) -> None:
        self._objects: OrderedDict[Hashable, T] = OrderedDict()

    def take(self, key: Hashable) -> T | None:
        """Remove and return the object under `key`, or None."""
        return self._objects.pop(key, None)

    def put(self, key: Hashable, value: T) -> None:
        """Put an object back. Beyond `KEPT` objects, the one put back longest ago is dropped."""
        self._objects[key] = value
        while len(self._objects) > KEPT:
            self._objects.popitem(last=False)

    def clear(self) -> None:
        """Drop all objects."""
        self._objects.clear()

    def __len__(self) -> int:
        return len(self._objects)


class GraphCache(LRUPool[T]):
    """Decoding sessions kept between calls of `generate` while the model is unchanged. Copies and pickles of it are empty."""

    _fingerprint: tuple[object, ...] = ()

    def of(self, model: nn.Module) -> GraphCache[T]:
        """Return this cache, emptied if the model's tensors have moved or its modules have changed since the last call."""
        fingerprint = _fingerprint(model)
        if fingerprint != self._fingerprint:
            self.clear()
            self._fingerprint = fingerprint
        return self

    def __deepcopy__(self, memo: object) -> GraphCache[T]:
        return GraphCache()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return GraphCache, ()


class GraphedDecodingSession(DecodingSession):
    """A decoding session whose prefill (by the prompt's shapes) and step are captured at their second run, then replayed."""

    def __init__(self, model: GenerativeModel, batch: int, capacity: int, sampling: SamplingConfig) -> None:
        super().__init__(model, batch, capacity, sampling)
        self._recorder = Recorder(self.generator)
        # Store plain functions: a bound method would make a reference cycle and keep the KV cache alive until garbage collection.
        self._step = GraphedFunction(DecodingSession.step, self._recorder)
        self._prefills: LRUPool[tuple[dict[str, Tensor], GraphedFunction]] = LRUPool()

    def prefill(self, model: GenerativeModel, prompt: Mapping[str, Tensor]) -> None:
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in prompt.items())
        kept = self._prefills.take(key)
        if kept is None:
            inputs = {name: torch.empty_like(tensor) for name, tensor in prompt.items()}
            kept = inputs, GraphedFunction(DecodingSession.prefill, self._recorder)
        inputs, prefill = kept
        for name, tensor in prompt.items():
            inputs[name].copy_(tensor)
        prefill(self, model, inputs)
        self._prefills.put(key, kept)

    def step(self, model: GenerativeModel) -> None:
        self._step(self, model)


def capture_unsupported_reason(model: nn.Module, device: torch.device) -> str | None:
    """Return why generation with `model` cannot be captured on a device, or None if it can."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if torch.is_autocast_enabled(device.type):
        return "autocast keeps casts of the weights only as long as it lasts"
    for module in _modules(model):
        kind = type(module)
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a {kind.__name__} has a forward hook, which a graph would not call"
        # An adapter's layer may depend on numbers and switches that are not tensors, which a graph would not see.
        package, _, rest = kind.__module__.partition(".")
        if package not in ("torch", "pg_kernels") or rest.startswith("integrations."):
            return f"there is a {kind.__name__}, of which a graph might miss changes"
    return None


def _fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Return what a captured graph depends on: the address of every tensor, the modules, and global settings."""
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
    """Return all modules, as `model.modules()` does, in a third of its time: each call of `generate` waits for it."""
    found = [model]
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return found
