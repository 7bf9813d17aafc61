"""llama.cpp as a contender: it runs PaliGemma's decoder only, causally and on text, with weights of 8.5 bits."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pg_kernels.model import PaliGemma
from pg_kernels.model.checkpoints.saving import head_is_embedding
from pg_kernels.model.config import TextConfig
from pg_kernels.model.files import temporary_sibling
from pg_kernels.nn import RMSNorm

if TYPE_CHECKING:
    from gguf import GGUFWriter

BLOCK = 32
"""The number of weights that share a scale in Q8_0."""
CHUNK = 1 << 13
"""The number of blocks quantised at a time. Intermediate results stay in the cache: 3 times as fast as all blocks at once."""

GEMMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""A layer's modules and llama.cpp's names of their weights."""
GEMMA2 = GEMMA | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


# --- the file


def write_gguf(model: PaliGemma, path: Path, *, progress: bool = True) -> None:
    """Write the decoder in llama.cpp's format: matrices in Q8_0, norms in fp32, and only the size of the vocabulary.

    Args:
        model: of any floating dtype, on any device.
        path: replaced once the file is complete.
        progress: show a bar on stderr.

    Raises:
        ValueError: naming the field or layer of a model that llama.cpp cannot represent.
        OSError: when the file cannot be written.

    Source: llama.cpp's `convert_hf_to_gguf.py`, `gemma.cpp` and `gemma2.cpp`; its rotary embedding pairs halves, as ours does.
    """
    from gguf import GGUFWriter

    _check(model)
    modules = _modules(model)
    with temporary_sibling(path) as temporary:
        writer = GGUFWriter(temporary, model.config.text_config.model_type)
        try:
            _describe(writer, model.config.text_config)
            _write_tensors(writer, modules, progress)
        finally:
            writer.close()
        os.replace(temporary, path)


def _check(model: PaliGemma) -> None:
    config = model.config.text_config
    if not (model.config.tie_word_embeddings and head_is_embedding(model)):
        raise ValueError("tie_word_embeddings: llama.cpp's Gemma has no output head of its own")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (getattr(config, name) is None) != (config.model_type == "gemma"):
            raise ValueError(
                f"{name}: llama.cpp has it in Gemma 2, always, and not in Gemma; got {getattr(config, name)}"
            )
    if config.model_type == "gemma" and config.sliding_window is not None:
        raise ValueError(f"sliding_window: llama.cpp's Gemma has none, got {config.sliding_window}")
    scale = _attention_scale(config)
    if not math.isclose(config.attention_scale, scale):
        raise ValueError(
            f"query_pre_attn_scalar: llama.cpp takes {scale**-2:g} for these shapes, got {config.query_pre_attn_scalar}"
        )
    for name, row in (
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("num_attention_heads * head_dim", config.num_attention_heads * config.head_dim),
    ):
        if row % BLOCK:
            raise ValueError(f"{name}: Q8_0 needs a multiple of {BLOCK}, got {row}")


def _attention_scale(config: TextConfig) -> float:
    """Return llama.cpp's scale of the queries. It recognises Gemma 2 27B, whose scale differs, by its depth."""
    is_27b = config.model_type == "gemma2" and config.num_hidden_layers == 46
    return (config.hidden_size // config.num_attention_heads if is_27b else config.head_dim) ** -0.5


def _modules(model: PaliGemma) -> dict[str, Any]:
    """Return the decoder's modules by llama.cpp's names of their weights."""
    decoder = model.model.language_model
    names = GEMMA2 if model.config.text_config.model_type == "gemma2" else GEMMA
    modules: dict[str, Any] = {"token_embd.weight": decoder.embed_tokens, "output_norm.weight": decoder.norm}
    for index, layer in enumerate(decoder.layers):
        modules |= {f"blk.{index}.{theirs}.weight": layer.get_submodule(ours) for ours, theirs in names.items()}
    for name, module in modules.items():
        if type(module) not in (nn.Linear, nn.Embedding, RMSNorm):
            raise ValueError(f"{name}: llama.cpp has plain layers only, got {type(module).__name__}")
    return modules


def _describe(writer: GGUFWriter, config: TextConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    # No text is tokenised here, and reading 257,216 invented pieces would only take time.
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gemma2":
        # llama.cpp's default window is 4096. A window over all positions hides nothing.
        writer.add_sliding_window(config.sliding_window or config.max_position_embeddings)
        attention_cap, final_cap = config.attn_logit_softcapping, config.final_logit_softcapping
        if attention_cap is None or final_cap is None:
            raise ValueError("llama.cpp's Gemma 2 has both softcaps; this configuration lacks one")
        writer.add_attn_logit_softcapping(attention_cap)
        writer.add_final_logit_softcapping(final_cap)


def _write_tensors(writer: GGUFWriter, modules: dict[str, Any], progress: bool) -> None:
    from gguf import GGMLQuantizationType as Type

    sizes = {name: _stored_bytes(module) for name, module in modules.items()}
    for name, module in modules.items():
        kind = Type.F32 if isinstance(module, RMSNorm) else Type.Q8_0
        writer.add_tensor_info(name, module.weight.shape, np.dtype(np.float32), sizes[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    shown = tqdm(
        total=sum(sizes.values()), desc="writing GGUF", unit="B", unit_scale=True, disable=None if progress else True
    )
    with _one_thread(), shown as bar:
        for name, module in modules.items():
            writer.write_tensor_data(_stored(module))
            bar.update(sizes[name])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: thousands of short ops on several threads take 4 minutes while another process uses a core, 10 s on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _stored_bytes(module: Any) -> int:
    return module.weight.numel() * 4 if isinstance(module, RMSNorm) else module.weight.numel() // BLOCK * (BLOCK + 2)


@torch.no_grad()
def _stored(module: Any) -> np.ndarray[Any, Any]:
    if isinstance(module, RMSNorm):
        return (module.weight.float() + module.weight_offset).cpu().numpy()
    return quantize_q8_0(module.weight.cpu()).numpy()


def quantize_q8_0(weight: Tensor) -> Tensor:
    """Round a weight [rows, columns], columns a multiple of 32, to uint8 [rows * columns / 32, 34], both on the CPU.

    Each block of 32 is its scale in fp16 and 32 int8. Source: llama.cpp's `quantize_row_q8_0_ref`.
    """
    blocks = weight.reshape(-1, BLOCK)
    stored = torch.empty(len(blocks), BLOCK + 2, dtype=torch.uint8)
    for values, out in zip(blocks.split(CHUNK), stored.split(CHUNK)):
        values = values.float()
        scales = values.abs().amax(1, keepdim=True) / 127
        inverse = torch.where(scales > 0, 1 / scales, 0.0)
        out[:, :2] = scales.half().view(torch.uint8)
        out[:, 2:] = (values * inverse).round_().to(torch.int8).view(torch.uint8)
    return stored


# --- the decoder


class LlamaDecoder:
    """llama.cpp on a file of `write_gguf`, for one sequence. A token's position is the number of tokens before it.

    Args:
        path: may be removed after construction.
        threads: the number of threads for prefill and decode.
        context: the largest number of tokens.
        gpu: whether all layers and the cache are on the GPU.

    Raises:
        ValueError: a file that llama.cpp cannot read; a GPU for a llama.cpp built without one.
    """

    def __init__(self, path: Path, *, threads: int, context: int, gpu: bool) -> None:
        import llama_cpp

        # llama.cpp prints progress by default. The binding treats warnings as errors, so only a level above all levels silences
        # it.
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
        if gpu and not llama_cpp.llama_supports_gpu_offload():
            raise ValueError("gpu: this llama_cpp was built without one")
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), _model_parameters(gpu))
        if not model:
            raise ValueError(f"{path} cannot be read by llama.cpp")
        state = llama_cpp.llama_init_from_model(model, _context_parameters(threads, context, gpu))
        self._free = weakref.finalize(self, _free, model, state)
        if not state:
            raise ValueError(f"llama.cpp cannot run {path} with a context of {context}")
        self._api: Any = llama_cpp
        self._context, self._state = context, state
        self._memory = llama_cpp.llama_get_memory(state)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def prefill(self, ids: Sequence[int]) -> None:
        """Clear the cache and read all ids in one batch. Raises ValueError for more ids than the context."""
        if len(ids) > self._context:
            raise ValueError(f"ids: {len(ids)} are more than the context of {self._context}")
        self._api.llama_memory_clear(self._memory, False)
        self._evaluate(ids)

    def decode(self, id: int) -> None:
        """Read one more token."""
        self._evaluate((id,))

    def logits(self) -> Tensor:
        """Return the last token's logits, fp32 [vocabulary] on the CPU."""
        found = self._api.llama_get_logits_ith(self._state, -1)
        return torch.from_numpy(np.ctypeslib.as_array(found, (self._vocabulary,)).copy())

    def rewind(self, length: int) -> None:
        """Drop all tokens but the first `length`."""
        self._api.llama_memory_seq_rm(self._memory, 0, length, -1)

    def close(self) -> None:
        """Free the memory, as garbage collection does."""
        self._free()

    def _evaluate(self, ids: Sequence[int]) -> None:
        # Such a batch is appended to the cache and returns only the last token's logits.
        tokens = (ctypes.c_int32 * len(ids))(*ids)  # the batch points to them
        batch = self._api.llama_batch_get_one(tokens, len(ids))
        status = self._api.llama_decode(self._state, batch)
        if status:
            raise RuntimeError(f"llama.cpp failed on {len(ids)} token(s) with status {status}")
        # Wait for a GPU: it would still be working when the clock stops.
        self._api.llama_synchronize(self._state)


def _model_parameters(gpu: bool) -> Any:
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = -1 if gpu else 0
    # Use one GPU, like the other contenders, and none when a CPU is timed: llama.cpp would send long batches to it.
    parameters.split_mode = llama_cpp.LLAMA_SPLIT_MODE_NONE
    parameters.main_gpu = 0 if gpu else -1
    return parameters


def _context_parameters(threads: int, context: int, gpu: bool) -> Any:
    import llama_cpp

    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context
    # The default allocates a row of logits for every token: 1.3 GB at 1,300 tokens.
    parameters.n_outputs_max = 1
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.offload_kqv = parameters.op_offload = gpu
    # A cache of the window's size lacks the oldest tokens after a rewind.
    parameters.swa_full = True
    return parameters


def _free(model: Any, state: Any) -> None:
    import llama_cpp

    if state:
        llama_cpp.llama_free(state)
    llama_cpp.llama_model_free(model)
