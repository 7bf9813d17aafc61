"""The trained parameters, their fp32 master weights, and the optimisers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import parallel
from .recipe import Recipe


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Freeze the parameters below the named modules, such as `vision_tower` or `language_model.layers.0`."""
    named = dict(model.named_parameters(remove_duplicate=False))  # a tied head's name, too
    for part in parts:
        found = [parameter for name, parameter in named.items() if f".{part}." in f".{name}."]
        if not found:
            names = sorted({module for name in named for module in name.split(".")[:2]} - {"weight"})
            raise ValueError(f"frozen: the model has no part {part!r}; it has {', '.join(names)} and what is in them")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("frozen: no parameter is left to train")


class Weights:
    """The parameters to train, by name, and the fp32 master weights that the optimizer updates.

    In float32 both are the same tensors. In bfloat16 the model computes in bfloat16. On a CPU with bf16 instructions this takes
    two thirds of fp32's time (1.15 s against 1.73 s for 64 examples on one core), and autocast takes longer than both; on a CPU
    without bf16 instructions it takes ten times fp32's. With several processes FSDP rounds parameters when it gathers them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = self.parameters
        self.device = next(iter(self.parameters.values())).device
        if parallel.world() > 1:
            return
        if dtype != torch.float32:  # before the rounding
            self.masters = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}
        model.to(dtype)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the parameters' gradients to the master weights' in fp32, and clear the parameters' gradients."""
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
        """Copy the master weights into the parameters, rounded to their dtype."""
        if self.masters is not self.parameters:
            torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))

    @torch.no_grad()
    def load(self, saved: Callable[[str], Tensor]) -> None:
        """Restore saved master weights, by name."""
        for name, master in self.masters.items():
            parallel.copy_full_(master, saved(name))
        self.put()


def build_optimizers(model: nn.Module, weights: Weights, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return AdamW, or AdamW and Muon for the hidden layers' matrices if the recipe says so, over the master weights.

    Muon's steps are scaled to AdamW's size, so that one learning rate fits both. Source: Jordan,
    https://kellerjordan.github.io/posts/muon/; Liu et al., https://arxiv.org/abs/2502.16982.
    """
    hidden: list[Tensor] = []
    if recipe.optimizer == "muon":
        if parallel.world() > 1:
            raise ValueError("optimizer: muon needs whole matrices, which several processes do not have; use adamw")
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
