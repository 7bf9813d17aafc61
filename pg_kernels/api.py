"""All public names of pg_kernels. Importing this module registers every op with torch."""

from pg_kernels.backends import backend
from pg_kernels.ops.apply_rotary import apply_rotary, apply_rotary_to_cache
from pg_kernels.ops.geglu import geglu
from pg_kernels.ops.geglu_mlp import geglu_mlp
from pg_kernels.ops.int8_linear import PackedInt8Weight, int8_geglu, int8_linear, int8_projections, int8_topk, pack_int8
from pg_kernels.ops.layer_norm import layer_norm
from pg_kernels.ops.linear_cross_entropy import linear_cross_entropy
from pg_kernels.ops.prefix_lm_attention import prefix_lm_attention, prefix_lm_attention_varlen
from pg_kernels.ops.quantize_int8 import quantize_int8
from pg_kernels.ops.rms_norm import rms_norm
from pg_kernels.quantization import quantize_

__all__ = [
    "PackedInt8Weight",
    "apply_rotary",
    "apply_rotary_to_cache",
    "backend",
    "geglu",
    "geglu_mlp",
    "int8_geglu",
    "int8_linear",
    "int8_projections",
    "int8_topk",
    "layer_norm",
    "linear_cross_entropy",
    "pack_int8",
    "prefix_lm_attention",
    "prefix_lm_attention_varlen",
    "quantize_",
    "quantize_int8",
    "rms_norm",
]
