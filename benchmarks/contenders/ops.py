"""The contenders of ops: our backends, plain PyTorch and other packages, each a few lines from inputs to a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pg_kernels import backend
from pg_kernels.backends import available
from pg_kernels.benchmarks.cases import ops
from pg_kernels.benchmarks.cases.ops import OPS, Build, Inputs, rotary_tables

COMPILED = "torch.compile"


@dataclass(frozen=True)
class Contender:
    """One way to run an op."""

    name: str
    build: Callable[[Inputs], Any]
    """Returns the call to time for the inputs (for a whole model a `Candidate`). Raises ValueError for unsupported inputs."""
    package: str = ""
    """The import name of a package that it needs beyond the installation's."""
    device_type: str = ""
    """The only device type it runs on; empty for all."""
    ours: bool = False
    baseline: bool = False
    int8_weights: bool = False
    """Whether a whole model's linear layers and embedding are int8, with fewer bytes to read."""
    int8_activations: bool = False
    """Whether products multiply int8 by int8."""

    def unavailable_reason(self, device_type: str) -> str | None:
        """Return why it cannot run here, or None."""
        if self.package and util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.device_type and device_type != self.device_type:
            return "needs a CUDA GPU" if self.device_type == "cuda" else "CPU only"
        return None


def contenders(op: str, device_type: str, *, sweep: bool = False) -> list[Contender]:
    """Return the contenders of an op, our default first; for a sweep only our default and the baseline."""
    ours = _our_backends(op, device_type)
    baseline = Contender("eager", OPS[op].eager, baseline=True)
    if sweep:
        return [ours[0], baseline]
    compiled = Contender(COMPILED, lambda inputs: _compiled(OPS[op].eager(inputs)))
    return [*ours, baseline, compiled, *PEERS.get(op, ())]


def _our_backends(op: str, device_type: str) -> list[Contender]:
    """Return a contender for each backend that can run the op here, in the order of "auto"."""
    registered = {"add_rms_norm": "rms_norm"}.get(op, op)
    found = [
        Contender(f"pg_kernels {name}", partial(_on_backend, name, OPS[op].ours), ours=True)
        for name in available(registered, device_type)
    ]
    if op == "int8_linear":
        name = f"{found[0].name} W8A8"
        found.append(replace(found[0], name=name, build=ops.build_int8_activations, int8_activations=True))
    return found


def _on_backend(name: str, build: Build, inputs: Inputs) -> partial[Any]:
    inner = build(inputs)  # outside the backend block: quantising and packing are other ops

    def run() -> Any:
        with backend(name):
            return inner()

    return partial(run)


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return one compiled wrapper for each function, so that its calls share compilations."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def _compiled(eager: partial[Any]) -> partial[Any]:
    return partial(_compile(eager.func), *eager.args, **eager.keywords)


# --- attention


def _sdpa(inputs: Inputs, kernel: SDPBackend | None = None) -> partial[Any]:
    if inputs["softcap"] is not None:
        raise ValueError("has no softcap")
    options = {"attn_mask": ops.dense_mask(inputs), "enable_gqa": inputs["q"].shape[1] != inputs["k"].shape[1]}
    attend = partial(F.scaled_dot_product_attention, inputs["q"], inputs["k"], inputs["v"], **options)
    return attend if kernel is None else partial(_with_kernel, kernel, attend)


def _with_kernel(kernel: SDPBackend, attend: Callable[[], Tensor]) -> Tensor:
    with sdpa_kernel(kernel):
        return attend()


def _flex_attention(inputs: Inputs) -> partial[Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (inputs[name] for name in "qkv")
    if q.device.type == "cpu" and q.requires_grad:
        raise ValueError("has no backward pass on CPUs")
    queries, tokens, softcap, prefix_lens = q.shape[2], k.shape[2], inputs["softcap"], inputs["prefix_lens"]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query + (tokens - queries)) | (key < prefix_lens[batch])

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    mask = None
    if inputs["causal"]:
        mask = create_block_mask(visible, q.shape[0], None, queries, tokens, device=q.device)
    return partial(
        _compile(flex_attention),
        q,
        k,
        v,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        enable_gqa=q.shape[1] != k.shape[1],
    )


# --- Liger-Kernel: Triton, so CUDA only


def _liger_rms_norm(inputs: Inputs) -> partial[Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # The arguments are eps, the weight's offset, Gemma's casting mode, and in_place=False for the incoming gradient.
    return partial(LigerRMSNormFunction.apply, inputs["x"], inputs["weight"], 1e-6, 1.0, "gemma", False)


def _liger_layer_norm(inputs: Inputs) -> partial[Any]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return partial(LigerLayerNormFunction.apply, inputs["x"], inputs["weight"], inputs["bias"], 1e-6)


def _liger_rotary(inputs: Inputs) -> partial[Any]:
    from liger_kernel.ops.rope import LigerRopeFunction

    cos, sin = rotary_tables(inputs["q"], inputs["positions"])
    return partial(_on_copies, LigerRopeFunction.apply, inputs["q"], inputs["k"], cos, sin)


def _on_copies(rotate: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    # It rotates in place, which is only right for inputs that are not used again.
    return rotate(q.clone(), k.clone(), cos, sin)


def _liger_geglu(inputs: Inputs) -> partial[Any]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return partial(LigerGELUMulFunction.apply, inputs["gate"], inputs["up"])


def _liger_geglu_mlp(inputs: Inputs) -> partial[Any]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return partial(_mlp_around, LigerGELUMulFunction.apply, **inputs)


def _mlp_around(
    activation: Callable[..., Tensor], x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor
) -> Tensor:
    return F.linear(activation(F.linear(x, gate_weight), F.linear(x, up_weight)), down_weight)


def _liger_cross_entropy(inputs: Inputs) -> partial[Any]:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=inputs["softcap"])
    return partial(loss, inputs["weight"], inputs["hidden"], inputs["labels"])


# --- int8 weights


def _int8pack(inputs: Inputs) -> partial[Any]:
    if inputs["x"].dtype != torch.bfloat16 or inputs["group_size"] is not None:
        raise ValueError("only for bfloat16 and one scale per row")
    if inputs["weight"].shape[1] % 16:
        raise ValueError("crashes unless K is a multiple of 16")
    qweight, scale = ops.quantize(inputs["weight"])
    return partial(torch._weight_int8pack_mm, inputs["x"], qweight, scale.bfloat16())


def _torchao(inputs: Inputs, config: str) -> partial[Any]:
    from torchao import quantization

    if inputs["group_size"] is not None:
        raise ValueError("compared with one scale per row only")
    linear = _linear(inputs["weight"])
    quantization.quantize_(linear, getattr(quantization, config)())
    return partial(_without_gradient, linear, inputs["x"])


def _bitsandbytes(inputs: Inputs) -> partial[Any]:
    import bitsandbytes

    if inputs["group_size"] is not None:
        raise ValueError("has one scale per row only")
    weight = inputs["weight"]
    linear = bitsandbytes.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    linear.load_state_dict({"weight": weight.half().cpu()})
    return partial(_without_gradient, linear.to(weight.device), inputs["x"])


def _linear(weight: Tensor) -> torch.nn.Module:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    return torch.nn.Sequential(linear)


def _without_gradient(module: torch.nn.Module, x: Tensor) -> Tensor:
    return module(x).to(x.dtype)


PEERS: Mapping[str, tuple[Contender, ...]] = {
    "rms_norm": (Contender("Liger-Kernel", _liger_rms_norm, "liger_kernel", "cuda"),),
    "layer_norm": (Contender("Liger-Kernel", _liger_layer_norm, "liger_kernel", "cuda"),),
    "apply_rotary": (Contender("Liger-Kernel", _liger_rotary, "liger_kernel", "cuda"),),
    "geglu": (Contender("Liger-Kernel", _liger_geglu, "liger_kernel", "cuda"),),
    "geglu_mlp": (Contender("Liger-Kernel", _liger_geglu_mlp, "liger_kernel", "cuda"),),
    "prefix_lm_attention": (
        Contender("SDPA", _sdpa),
        Contender("SDPA cuDNN", partial(_sdpa, kernel=SDPBackend.CUDNN_ATTENTION), device_type="cuda"),
        Contender("SDPA flash", partial(_sdpa, kernel=SDPBackend.FLASH_ATTENTION), device_type="cuda"),
        Contender("SDPA efficient", partial(_sdpa, kernel=SDPBackend.EFFICIENT_ATTENTION), device_type="cuda"),
        Contender("FlexAttention", _flex_attention),
    ),
    "linear_cross_entropy": (Contender("Liger-Kernel", _liger_cross_entropy, "liger_kernel", "cuda"),),
    "int8_linear": (
        Contender("torch int8pack", _int8pack),
        Contender("torchao W8A16", partial(_torchao, config="Int8WeightOnlyConfig"), "torchao"),
        Contender(
            "torchao W8A8",
            partial(_torchao, config="Int8DynamicActivationInt8WeightConfig"),
            "torchao",
            int8_activations=True,
        ),
        Contender("bitsandbytes LLM.int8", _bitsandbytes, "bitsandbytes"),
    ),
}
"""Other packages' kernels, by op."""
