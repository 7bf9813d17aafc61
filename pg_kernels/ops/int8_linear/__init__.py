from pg_kernels.ops.int8_linear.geglu import int8_geglu
from pg_kernels.ops.int8_linear.op import int8_linear
from pg_kernels.ops.int8_linear.packed import PackedInt8Weight, pack_int8
from pg_kernels.ops.int8_linear.projections import int8_projections
from pg_kernels.ops.int8_linear.topk import int8_topk

__all__ = ["PackedInt8Weight", "int8_geglu", "int8_linear", "int8_projections", "int8_topk", "pack_int8"]
