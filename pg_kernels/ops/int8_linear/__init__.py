from pg_kernels.ops.int8_linear.op import (
    PackedInt8Weight,
    int8_geglu,
    int8_linear,
    int8_projections,
    int8_topk,
    pack_int8,
)

__all__ = ["PackedInt8Weight", "int8_geglu", "int8_linear", "int8_projections", "int8_topk", "pack_int8"]
