from pg_kernels.ops.prefix_lm_attention.op import prefix_lm_attention, prefix_lm_attention_varlen

__all__ = ["prefix_lm_attention", "prefix_lm_attention_varlen"]
