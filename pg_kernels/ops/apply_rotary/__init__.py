from pg_kernels.ops.apply_rotary.op import apply_rotary, apply_rotary_to_cache

__all__ = ["apply_rotary", "apply_rotary_to_cache"]
