from pg_kernels.ops.quantize_int8.op import check_group_size, quantize_int8

__all__ = ["check_group_size", "quantize_int8"]
