"""The ops as modules, with the parameter names of the Hugging Face modules that they replace."""

from pg_kernels.nn.attention import PrefixLMAttention
from pg_kernels.nn.fusion import fuse_qkv_, is_plain_int8_linear, is_plain_linear, project
from pg_kernels.nn.int8 import Int8Embedding, Int8Linear
from pg_kernels.nn.mlp import GeGLUMLP
from pg_kernels.nn.norms import LayerNorm, RMSNorm, add_and_norm
from pg_kernels.nn.rotary import RotaryEmbedding

__all__ = [
    "GeGLUMLP",
    "Int8Embedding",
    "Int8Linear",
    "LayerNorm",
    "PrefixLMAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "add_and_norm",
    "fuse_qkv_",
    "is_plain_int8_linear",
    "is_plain_linear",
    "project",
]
