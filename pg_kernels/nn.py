"""The ops as modules, with the parameter names of the Hugging Face modules that they replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pg_kernels.ops._common.autograd import needs_autograd
from pg_kernels.ops.apply_rotary import apply_rotary, apply_rotary_to_cache
from pg_kernels.ops.geglu import geglu
from pg_kernels.ops.geglu_mlp import geglu_mlp
from pg_kernels.ops.int8_linear import int8_geglu, int8_linear, int8_projections, pack_int8
from pg_kernels.ops.layer_norm import layer_norm
from pg_kernels.ops.prefix_lm_attention import prefix_lm_attention
from pg_kernels.ops.quantize_int8 import check_group_size, quantize_int8
from pg_kernels.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """`pg_kernels.rms_norm` with its weight [dim]; Gemma's, which adds 1 to the weight, unless weight_offset says otherwise."""

    def __init__(self, dim: int, eps: float = 1e-6, *, weight_offset: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - weight_offset))
        self.eps = eps
        self.weight_offset = weight_offset

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x [..., dim]; with a residual of its shape give (y, x + residual)."""
        return rms_norm(x, self.weight, self.eps, weight_offset=self.weight_offset, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, weight_offset={self.weight_offset}"


class LayerNorm(nn.Module):
    """`pg_kernels.layer_norm` in the place of an nn.LayerNorm with weight and bias, over the last dimension.

    Raises ValueError for a shape of several dimensions.
    """

    def __init__(self, normalized_shape: int | Sequence[int], eps: float = 1e-5) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if len(shape) != 1:
            raise ValueError(f"normalized_shape: expected one size, the last dimension's, got {list(shape)}")
        self.normalized_shape = shape
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x [..., N]; with a residual of its shape give (y, x + residual)."""
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RotaryEmbedding(nn.Module):
    """`pg_kernels.apply_rotary` with its theta: turns queries and keys itself, so that no cosines and sines are handed around."""

    def __init__(self, theta: float = 10_000.0) -> None:
        super().__init__()
        self.theta = theta

    @classmethod
    def from_config(cls, config: Any) -> RotaryEmbedding:
        """As transformers' GemmaRotaryEmbedding is made. Raises ValueError for another model and scaled frequencies."""
        _is_gemma2(config)
        parameters = config.rope_parameters
        if parameters["rope_type"] != "default":
            raise ValueError(f"config: rope_type is {parameters['rope_type']!r}, supported is 'default'")
        return cls(parameters["rope_theta"])

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q [B, H, S, D] and k [B, Hkv, S, D] by positions [S] or [B, S]."""
        return apply_rotary(q, k, positions, theta=self.theta)

    def extra_repr(self) -> str:
        return f"theta={self.theta}"


class PrefixLMAttention(nn.Module):
    """Gemma's attention, with the parameter names of transformers': projections, rotary embedding, `prefix_lm_attention`.

    Args:
        hidden_size: the last dimension of what comes in and goes out.
        num_attention_heads, num_key_value_heads, head_dim: H, Hkv and D.
        bias: whether the four projections have one.
        scale, softcap, window: as for `prefix_lm_attention`.
        theta: as for `apply_rotary`.

    Raises ValueError when Hkv does not divide H.

    Source: Gemma, https://arxiv.org/abs/2403.08295; Gemma 2, https://arxiv.org/abs/2408.00118.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        bias: bool = False,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        theta: float = 10_000.0,
    ) -> None:
        super().__init__()
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {num_key_value_heads} does not divide num_attention_heads, {num_attention_heads}"
            )
        self.head_dim, self.scale, self.softcap, self.window = head_dim, scale, softcap, window
        query_dim, kv_dim = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, query_dim, bias)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias)
        self.o_proj = nn.Linear(query_dim, hidden_size, bias)
        self.rotary_emb = RotaryEmbedding(theta)

    @classmethod
    def from_config(cls, config: Any, layer_idx: int) -> PrefixLMAttention:
        """As transformers' GemmaAttention and Gemma2Attention are made.

        Raises ValueError for another model, dropout and scaled frequencies.
        """
        gemma2 = _is_gemma2(config)
        if config.attention_dropout:
            raise ValueError(f"config: attention_dropout is {config.attention_dropout}, supported is 0")
        sliding = gemma2 and config.layer_types[layer_idx] == "sliding_attention"
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.attention_bias,
            scale=config.query_pre_attn_scalar**-0.5 if gemma2 else None,
            softcap=config.attn_logit_softcapping if gemma2 else None,
            window=config.sliding_window if sliding else None,
            theta=RotaryEmbedding.from_config(config).theta,
        )

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        prefix_lens: Tensor | int | None = None,
        kv_starts: Tensor | int | None = None,
        kv_lens: Tensor | int | None = None,
        q_starts: Tensor | int | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        cache_positions: Tensor | None = None,
        query_index: Tensor | None = None,
    ) -> Tensor:
        """Map x [B, S, hidden_size] to the same shape.

        Args:
            positions: [S] or [B, S], int32 or int64: what the rotary embedding turns by.
            prefix_lens, kv_starts, kv_lens, q_starts: as for `prefix_lm_attention`.
            cache: keys and values [B, Hkv, capacity, D]: x's own are written into them, and x attends to all that they hold. For
                inference only; as their size tells nothing, `kv_lens` and `q_starts` must.
            cache_positions: [S] or [B, S], int32 or int64: where in the cache x's keys and values go.
            query_index: int64 [B], a row of each example's x: give [B, 1, hidden_size], of that one alone.

        Raises ValueError for a cache without cache_positions, lengths or the reverse, and what the ops raise.
        """
        if (cache is None) != (cache_positions is None):
            raise ValueError("cache and cache_positions: one needs the other")
        if cache is not None and (kv_lens is None or q_starts is None):
            raise ValueError("kv_lens and q_starts: needed with a cache")
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for y in projections(x, (self.q_proj, self.k_proj, self.v_proj))
        )
        if cache is None or cache_positions is None:
            q, k = self.rotary_emb(q, k, positions)
        else:
            q = apply_rotary_to_cache(q, k, v, positions, *cache, cache_positions, theta=self.rotary_emb.theta)
            k, v = cache
        if query_index is not None:
            q = q.gather(2, query_index[:, None, None, None].expand(-1, q.shape[1], 1, q.shape[3]))
            q_starts = (k.shape[2] - x.shape[1] if q_starts is None else q_starts) + query_index.int()
        out = prefix_lm_attention(
            q,
            k,
            v,
            prefix_lens=prefix_lens,
            kv_starts=kv_starts,
            kv_lens=kv_lens,
            q_starts=q_starts,
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, scale={self.scale}, softcap={self.softcap}, window={self.window}"


class GeGLUMLP(nn.Module):
    """`pg_kernels.geglu_mlp` with its three projections as submodules, so that adapters and quantisers can replace them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    @classmethod
    def from_config(cls, config: Any) -> GeGLUMLP:
        """As transformers' GemmaMLP and Gemma2MLP are made. Raises ValueError for another model and another activation."""
        activation = config.hidden_activation if _is_gemma2(config) else config.hidden_act
        if activation != "gelu_pytorch_tanh":
            raise ValueError(f"config: the activation is {activation!r}, supported is 'gelu_pytorch_tanh'")
        return cls(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., dim] to [..., dim]."""
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if all(map(is_only_a_product, projections)):
            return geglu_mlp(x, *(projection.weight for projection in projections))
        gate: Any = self.gate_proj
        up: Any = self.up_proj
        if _share_activations((gate, up)) and gate.bias is None and up.bias is None:
            return self.down_proj(int8_geglu(x, gate.weight, up.weight, activations=gate.activations))
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class _Int8Module(nn.Module):
    """Has an int8 weight, which is no parameter: frozen, never cast, laid out for its device.

    In a state_dict it is `weight`, int8 [N, K], and `weight_scale`, fp32 [N] or [N, groups], whatever the layout.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        group_size: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_group_size(group_size)
        self.group_size = group_size
        with torch.device(torch.get_default_device() if device is None else device):
            self.weight = pack_int8(
                torch.zeros(rows, columns, dtype=torch.int8), torch.zeros(rows, dtype=torch.float32)
            )
        self.weight.dtype = dtype or torch.get_default_dtype()

    @property
    def dtype(self) -> torch.dtype:
        """That of what it gives, or of its bias; modules that share a weight share this, too."""
        return self.weight.dtype

    def set_weight(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """Take int8 [N, K] with its fp32 scale, or floats [N, K], which are quantised; the weight goes to their device.

        Raises ValueError for another shape than the module's, and what `quantize_int8` and `pack_int8` raise.
        """
        if weight.shape != self.weight.shape:
            raise ValueError(f"weight: expected shape {list(self.weight.shape)}, got {list(weight.shape)}")
        if scale is None:
            weight, scale = quantize_int8(weight, group_size=self.group_size)
        self.weight.replace_(weight, scale)
        if scale.dim() == 1 or scale.shape[1] > 1:  # of a single group the size is not known
            self.group_size = None if scale.dim() == 1 else self.weight.group_size

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device))
        self.weight.move_(moved.device)
        self.weight.dtype = moved.dtype
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"], destination[f"{prefix}weight_scale"] = self.weight.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        _, _, missing, unexpected, errors = rest
        super()._load_from_state_dict(state_dict, prefix, *rest)  # first, as it calls hooks that may rename keys
        own = (f"{prefix}weight", f"{prefix}weight_scale")
        unexpected[:] = [name for name in unexpected if name not in own]
        weight, scale = (state_dict.get(f"{prefix}{name}") for name in ("weight", "weight_scale"))
        if weight is None:
            missing.append(f"{prefix}weight")
        elif not weight.is_floating_point() and scale is None:
            missing.append(f"{prefix}weight_scale")
        else:
            device = weight.device if self.weight.device.type == "meta" else self.weight.device
            try:
                self.set_weight(weight.detach().to(device), None if scale is None else scale.to(device))
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix}weight cannot be loaded: {error}")


class Int8Linear(_Int8Module):
    """`pg_kernels.int8_linear` in the place of an nn.Linear: a frozen int8 weight; gradients flow to the input and the bias.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear; the weight starts as zeros, the dtype is the bias's.
        group_size: columns that share a scale in what `set_weight` quantises, a power of two; default: the whole row.
        activations: "keep" or "int8", as for `int8_linear`.

    Raises ValueError for unknown `activations`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group_size: int | None = None,
        activations: str = "keep",
    ) -> None:
        if activations not in ("keep", "int8"):
            raise ValueError(f"activations: got {activations!r}, expected 'keep' or 'int8'")
        super().__init__(out_features, in_features, group_size, device, dtype)
        self.in_features, self.out_features, self.activations = in_features, out_features, activations
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, group_size: int | None = None, activations: str = "keep") -> Int8Linear:
        """Quantise an nn.Linear's weight (on the meta device: leave it open); its bias is shared.

        Raises TypeError and ValueError as `quantize_int8` does for the weight.
        """
        module = cls._replacing(linear, group_size, activations)
        if not linear.weight.is_meta:
            module.set_weight(linear.weight)
        return module

    @classmethod
    def from_torchao(cls, linear: nn.Linear) -> Int8Linear:
        """Take over levels and scales of an nn.Linear that torchao's `quantize_` has made int8; its bias is shared.

        Activations are quantised where torchao does so. Raises TypeError for a weight that is not torchao's Int8Tensor,
        ValueError for one that is not symmetric.
        """
        from torchao.quantization import Int8Tensor

        weight = linear.weight.data
        if not isinstance(weight, Int8Tensor):
            raise TypeError(f"linear: expected a weight of torchao's Int8Tensor, got {type(weight).__name__}")
        if weight.zero_point is not None and bool(weight.zero_point.any()):
            raise ValueError("linear: expected symmetric int8, got zero points that are not 0")
        module = cls._replacing(linear, None, "keep" if weight.act_quant_kwargs is None else "int8")
        scale = weight.scale.float().expand(len(weight.qdata), -1)
        module.set_weight(weight.qdata, scale[:, 0] if scale.shape[1] == 1 else scale)
        return module

    def dequantize(self) -> nn.Linear:
        """An nn.Linear of the numbers that the weight stands for, in `dtype`, and a copy of the bias; frozen, like the weight."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", self.dtype)
        linear.weight = nn.Parameter(self.weight.dequantize(self.dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    @classmethod
    def _replacing(cls, linear: nn.Linear, group_size: int | None, activations: str) -> Int8Linear:
        module = cls(
            linear.in_features,
            linear.out_features,
            False,
            "meta",
            linear.weight.dtype,
            group_size=group_size,
            activations=activations,
        )
        module.bias = linear.bias
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_features] to [..., out_features]."""
        return int8_linear(x, self.weight, bias=self.bias, activations=self.activations)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, activations={self.activations!r}"
        )


class Int8Embedding(_Int8Module):
    """An nn.Embedding of int8 rows, which it gives in `dtype`: for tables that are an Int8Linear's weight, too.

    Args:
        num_embeddings, embedding_dim, device, dtype: as for nn.Embedding; the rows start as zeros.
        group_size: as for Int8Linear.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group_size: int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, group_size, device, dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, indices: Tensor) -> Tensor:
        """Look up indices [...], int32 or int64, giving [..., embedding_dim]."""
        return self.weight.rows(indices, self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, group_size={self.group_size}"


def _is_gemma2(config: Any) -> bool:
    """Raises ValueError for a model that is neither Gemma 1 nor 2: its layers compute something else."""
    if config.model_type not in ("gemma", "gemma2"):
        raise ValueError(f"config: model_type is {config.model_type!r}, supported are 'gemma' and 'gemma2'")
    return config.model_type == "gemma2"


def normed_sum(norm: RMSNorm | LayerNorm, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """A norm of x + added [..., dim], and that sum, in one pass; of x alone where nothing is added."""
    if added is None:
        return norm(x), x
    return norm(added, residual=x)


def projections(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
    """What each of some linear layers makes of x [..., in_features], in one product where it can be.

    Int8 layers read and quantise x once; of others without gradients, `merge_projections_` must have laid the weights out.
    """
    if not _share_activations(layers):
        whole = _merged(x, layers)
        if whole is None:
            return tuple(layer(x) for layer in layers)
        return F.linear(x, *whole).split([layer.out_features for layer in layers], -1)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return int8_projections(x, weights, biases, activations=layers[0].activations)


@torch.no_grad()
def merge_projections_(model: nn.Module) -> None:
    """Lay the weights of each attention's q_proj, k_proj and v_proj one behind the other, in place: `projections` then makes one
    product of the three.

    Only nn.Linear layers. Parameters stay the same objects with the same numbers, and share their memory's allocation; moving the
    model undoes it.
    """
    with torch.inference_mode(False):
        for module in model.modules():
            layers = [module._modules.get(name) for name in ("q_proj", "k_proj", "v_proj")]
            if not all(type(layer) is nn.Linear for layer in layers):
                continue
            for name in ("weight", "bias"):
                parts = [getattr(layer, name) for layer in layers]
                alike = all(
                    part is not None and (part.dtype, part.device) == (parts[0].dtype, parts[0].device)
                    for part in parts
                )
                if not alike or _one_behind_the_other(parts) is not None:
                    continue
                whole = torch.cat([part.data for part in parts])
                for part, data in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                    part.data = data


def _merged(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, Tensor | None] | None:
    """The weights of some linear layers as one, and their biases, where they lie so and nobody watches."""
    plain = all(type(layer) is nn.Linear and _is_nothing_else(layer) for layer in layers)
    if not plain or torch.compiler.is_compiling():
        return None
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if needs_autograd(x, *weights, *biases):
        return None
    weight = _one_behind_the_other(weights)
    if weight is None or all(bias is None for bias in biases):
        return None if weight is None else (weight, None)
    bias = None if any(bias is None for bias in biases) else _one_behind_the_other(biases)
    return None if bias is None else (weight, bias)


def _one_behind_the_other(tensors: Sequence[Tensor]) -> Tensor | None:
    """Contiguous tensors [n, ...] as one, if each begins in memory where the one before it ends."""
    first = tensors[0]
    if any(type(tensor.data) is not Tensor or tensor.is_meta for tensor in tensors):
        return None  # without memory
    address, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        alike = (tensor.dtype, tensor.shape[1:]) == (first.dtype, first.shape[1:]) and tensor.is_contiguous()
        if not alike or tensor.data_ptr() != address or tensor.untyped_storage().data_ptr() != storage:
            return None
        address += tensor.nbytes
    return first.detach().as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def is_only_a_product(layer: nn.Module) -> bool:
    """Whether a layer does no more than multiply by its `.weight`, so that an op may do it instead.

    A LoRA layer has a `.weight`, too, and torchao's layers are nn.Linear around a tensor that multiplies in its own way.
    """
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and not is_traceable_wrapper_subclass(layer.weight)
        and _is_nothing_else(layer)
    )


def is_only_an_int8_product(layer: nn.Module) -> TypeGuard[Int8Linear]:
    """The same of a layer whose `.weight` is a `PackedInt8Weight`."""
    return type(layer) is Int8Linear and layer.bias is None and _is_nothing_else(layer)


def _share_activations(layers: Sequence[Any]) -> bool:
    """Whether they are Int8Linear, and no more than that, with activations of one kind."""
    return all(
        type(layer) is Int8Linear and layer.activations == layers[0].activations and _is_nothing_else(layer)
        for layer in layers
    )


def _is_nothing_else(layer: nn.Module) -> bool:
    """Whether a call of a layer runs its class's forward alone.

    Hooks watch a layer; hooks and a forward of its own, as accelerate's, may bring its weight only when it is called.
    """
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooks and "forward" not in vars(layer)
