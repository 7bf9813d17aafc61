"""Several processes for one training run: FSDP2 shards parameters, gradients and optimizer states over them.

All functions work with any number of processes, also with one and without a process group.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(device: torch.device) -> torch.device:
    """Join the process group if `torchrun` started this process. Return this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return device


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Wait until every process has called this function."""
    if world() > 1:
        dist.barrier()


def total(value: float, device: torch.device) -> float:
    """Return the sum of all processes' values, exchanged through their devices."""
    if world() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.item()


def gather(values: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return all processes' values, of the same number each, exchanged through their devices."""
    if world() == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.int64, device=device)
    found = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(found, own)
    return torch.stack(found).tolist()


def of_the_first(thing: Any) -> Any:
    """Return the first process's object, which must be picklable, on every process."""
    if world() == 1:
        return thing
    things = [thing]
    dist.broadcast_object_list(things)
    return things[0]


def shard_(root: nn.Module, layers: Iterable[nn.Module], dtype: torch.dtype, *methods: str) -> None:
    """Shard the parameters over the processes. A forward gathers them layer by layer.

    Trained parameters are stored in fp32 and compute in `dtype`; frozen parameters are stored in `dtype`. The root's own
    parameters are gathered in its forward and in `methods`. Source: Zhao et al., https://arxiv.org/abs/2304.11277; torch's FSDP2.
    """
    if world() == 1:
        return
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    for parameter in root.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    # FSDP warns, for every layer and step, that outputs are views, which must not be changed in place. No code does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh(next(root.parameters()).device.type, (world(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for method in methods:
        register_fsdp_forward_method(root, method)
    for module in root.modules():  # the root first
        if isinstance(module, FSDPModule):
            # FSDP gathers into the same tensors every time. If `generate` created them, they would be inference tensors.
            module.unshard()
            module.reshard()


@torch.no_grad()
def unshard_(root: nn.Module, dtype: torch.dtype) -> None:
    """Gather the parameters in `dtype` into the module, on the CPU, in the first process only."""
    if world() == 1:
        return
    whole: dict[int, nn.Parameter | None] = {}
    reshard(root)
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in whole:  # a tied one is one
                tensor = full(parameter).to("cpu", dtype)
                whole[id(parameter)] = nn.Parameter(tensor, parameter.requires_grad) if rank() == 0 else None
            if rank() == 0:
                module._parameters[name] = whole[id(parameter)]


def reshard(root: nn.Module) -> None:
    """Free the parameters that the root keeps gathered after a forward."""
    for module in root.modules():
        again: Any = getattr(module, "reshard", None)
        if world() > 1 and again is not None:
            again()


def full(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (a collective: every process must call it). Return unsharded tensors unchanged."""
    part: Any = tensor.detach()
    return part if not hasattr(part, "full_tensor") else part.full_tensor()


@torch.no_grad()
def copy_full_(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a tensor, or into this process's shard of it."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        # Every process has the whole tensor: no communication.
        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)
