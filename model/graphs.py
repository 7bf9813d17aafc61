"""Functions of tensors that stay where they are, as CUDA graphs: one launch instead of hundreds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from pg_kernels import backends
from pg_kernels.ops.int8_linear import PackedInt8Weight

KEPT = 4
"""How many sessions a model keeps, and a session prefills: each holds memory."""
Kept = TypeVar("Kept")


class Replayed:
    """A function without arguments and result, which works on tensors that stay where they are.

    The first call runs it, which also sets up whatever kernels need; the second captures it as a CUDA graph, which from then on
    is replayed. A function that is called once is never captured: that would take longer than the call.
    """

    def __init__(self, function: Callable[[], None], generator: torch.Generator | None) -> None:
        self._function, self._generator = function, generator
        self._graph: Any = None
        self._warm = False

    def __call__(self) -> None:
        if not self._warm:
            self._function()
            self._warm = True
            return
        if self._graph is None:
            self._graph = capture(self._function, self._generator)
        self._graph.replay()


def capture(function: Callable[[], None], generator: torch.Generator | None) -> Any:
    """Record a function's launches as a `torch.cuda.CUDAGraph`, without running them; each replay draws anew from `generator`."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    # Other threads may go on allocating memory.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph


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


class Sessions(Shelf[Kept]):
    """What a model keeps between calls of `generate`, as long as it is the same model; copies and pickles of it are empty."""

    _fingerprint: tuple[object, ...] = ()

    def of(self, model: nn.Module) -> Sessions[Kept]:
        """This, emptied if the model's tensors have moved or its modules changed since."""
        fingerprint = _fingerprint(model)
        if fingerprint != self._fingerprint:
            self.clear()
            self._fingerprint = fingerprint
        return self

    def __deepcopy__(self, memo: object) -> Sessions[Kept]:
        return Sessions()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Sessions, ()


def obstacle(model: nn.Module, device: torch.device) -> str | None:
    """Why a model's generation cannot be captured on a device, or None when it can."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a forward hook, which a graph would not call"
        # What an adapter's layer does may change with numbers and switches that are no tensors.
        if type(module).__module__.split(".")[0] not in ("torch", "pg_kernels"):
            return f"{name} is a {type(module).__name__}, of which a graph might miss changes"
    return None


def _fingerprint(model: nn.Module) -> tuple[object, ...]:
    """What a captured graph depends on: where every number is, which modules there are, and what runs them."""
    found: list[object] = [backends.requested()]
    for module in model.modules():
        found += [type(module), module.training]
        tensors = (*module._parameters.values(), *module._buffers.values())
        found += [tensor.data_ptr() for tensor in tensors if tensor is not None]
        weight = vars(module).get("weight")
        if isinstance(weight, PackedInt8Weight):
            found.append(weight.data_ptr())
    return tuple(found)
