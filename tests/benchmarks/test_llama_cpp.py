"""llama.cpp on files written for it, compared with our decoder on the same rounded weights."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pg_kernels.benchmarks.contenders import llama_cpp as ours
from pg_kernels.benchmarks.contenders.llama_cpp import LlamaDecoder, quantize_q8_0, write_gguf
from pg_kernels.model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

# No value is llama.cpp's default. Each changes the logits by more than the bound.
GEMMA = TextConfig("gemma", 512, 256, 320, 3, 4, 2, 64, rope_theta=100.0, rms_norm_eps=0.1, max_position_embeddings=128)
GEMMA2 = replace(GEMMA, model_type="gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=1.5)
CONFIGS = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma2 with a window": replace(GEMMA2, sliding_window=16),
    # llama.cpp recognises 27B by its depth and scales its queries by hidden_size / num_attention_heads.
    "gemma2 27B": replace(GEMMA2, num_hidden_layers=46, num_attention_heads=16, query_pre_attn_scalar=16.0),
}
PROMPT, STEPS = 40, 2
BOUND = 0.05
"""llama.cpp also rounds activations to 8 bits, an error of 0.012 to 0.028. With fp32 weights it would be 0.001."""


def random_model(text: TextConfig) -> PaliGemma:
    torch.manual_seed(0)
    model = PaliGemma(PaliGemmaConfig(VisionConfig(24, 40, 1, 2, image_size=28), text)).eval()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def round_weights(model: PaliGemma) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    for parameter in model.model.language_model.parameters():
        if parameter.dim() > 1:
            rounded = gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), kind), kind)
            parameter.copy_(torch.from_numpy(rounded))


def token_ids() -> list[int]:
    return torch.randint(0, 512, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(1)).tolist()


def deviation(out: Tensor, true: Tensor) -> float:
    return float((out - true).norm() / true.norm())


@pytest.fixture
def decoder(tmp_path: Path) -> LlamaDecoder:
    write_gguf(random_model(GEMMA2), tmp_path / "model.gguf", progress=False)
    return LlamaDecoder(tmp_path / "model.gguf", threads=1, context=PROMPT + STEPS, gpu=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_ours(name: str, tmp_path: Path) -> None:
    model, ids = random_model(CONFIGS[name]), token_ids()
    write_gguf(model, tmp_path / "model.gguf", progress=False)
    round_weights(model)
    with torch.no_grad():
        row = torch.tensor([ids])
        true = model(row, token_type_ids=torch.ones_like(row), logits_to_keep=STEPS + 1).logits[0]
    decoder = LlamaDecoder(tmp_path / "model.gguf", threads=1, context=len(ids), gpu=False)
    decoder.prefill(ids[:PROMPT])
    found = [decoder.logits()]
    for id in ids[PROMPT:]:
        decoder.decode(id)
        found.append(decoder.logits())
    assert found[0].dtype == torch.float32 and found[0].shape == (512,)
    deviations = [deviation(out, expected) for out, expected in zip(found, true, strict=True)]
    assert max(deviations) < BOUND, deviations


def test_rewinding_and_prefilling_again_give_the_same_logits(decoder: LlamaDecoder) -> None:
    ids = token_ids()
    decoder.prefill(ids[:PROMPT])
    first = decoder.logits()
    decoder.decode(ids[PROMPT])
    second = decoder.logits()
    decoder.decode(ids[PROMPT + 1])
    assert not torch.equal(second, decoder.logits())
    decoder.rewind(PROMPT)
    decoder.decode(ids[PROMPT])
    assert torch.equal(second, decoder.logits())
    decoder.prefill(ids[:PROMPT])
    assert torch.equal(first, decoder.logits())


def test_more_tokens_than_the_context_or_unknown_ones_are_refused(decoder: LlamaDecoder) -> None:
    with pytest.raises(ValueError, match="context of 42"):
        decoder.prefill([1] * (PROMPT + STEPS + 1))
    with pytest.raises(RuntimeError, match="failed on 1 token"):
        decoder.decode(512)
    decoder.close()
    decoder.close()


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], decoder: LlamaDecoder) -> None:
    decoder.prefill([1, 2, 3])
    decoder.decode(4)
    decoder.close()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_blocks_are_those_of_the_reference_quantiser() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 320) * 0.03
    weight[3, 32:64] = 0
    expected = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert (quantize_q8_0(weight).numpy().reshape(96, -1) == expected).all()


def test_file_holds_the_decoder_and_nothing_else(tmp_path: Path) -> None:
    model, path = random_model(GEMMA), tmp_path / "new" / "model.gguf"
    write_gguf(model.bfloat16(), path, progress=False)
    reader = gguf.GGUFReader(path)
    decoder = model.model.language_model
    parameters = list(decoder.parameters())
    assert sorted(t.n_elements for t in reader.tensors) == sorted(p.numel() for p in parameters)
    # All sizes are multiples of the alignment, so there is no padding.
    size = sum(p.numel() * 4 if p.dim() == 1 else p.numel() // 32 * 34 for p in parameters)
    assert path.stat().st_size == reader.data_offset + size
    norm = next(t.data for t in reader.tensors if t.name == "output_norm.weight")
    assert torch.equal(torch.from_numpy(norm.copy()), decoder.norm.weight.detach().float() + 1)
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(weight: Tensor) -> Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ours, "quantize_q8_0", fail)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="cannot write .*model.gguf: No space left"):
        write_gguf(random_model(GEMMA), path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"] and path.read_bytes() == b"old"


@pytest.mark.parametrize(
    "field, text",
    [
        ("hidden_size", replace(GEMMA, hidden_size=240)),
        ("intermediate_size", replace(GEMMA, intermediate_size=100)),
        (r"num_attention_heads \* head_dim", replace(GEMMA, num_attention_heads=2, head_dim=40)),
        ("query_pre_attn_scalar", replace(GEMMA, query_pre_attn_scalar=32.0)),
        ("query_pre_attn_scalar", replace(GEMMA2, num_hidden_layers=46, num_attention_heads=16)),
        ("sliding_window", replace(GEMMA, sliding_window=8)),
        ("attn_logit_softcapping", replace(GEMMA, attn_logit_softcapping=50.0)),
        ("final_logit_softcapping", replace(GEMMA2, final_logit_softcapping=None)),
    ],
)
def test_unrepresentable_fields_are_named(field: str, text: TextConfig, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = PaliGemma(PaliGemmaConfig(text_config=text))
    with pytest.raises(ValueError, match=f"^{field}: "):
        write_gguf(model, tmp_path / "model.gguf")


def test_untied_heads_and_adapted_layers_are_refused(tmp_path: Path) -> None:
    class Adapted(nn.Linear):
        pass

    model = random_model(GEMMA)
    model.model.language_model.layers[1].mlp.up_proj = Adapted(256, 320, bias=False)
    with pytest.raises(ValueError, match="blk.1.ffn_up.weight: .* Adapted"):
        write_gguf(model, tmp_path / "model.gguf")
    model.config = replace(model.config, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        write_gguf(model, tmp_path / "model.gguf")


def test_unreadable_files_and_missing_gpus_are_errors(tmp_path: Path) -> None:
    import llama_cpp

    (tmp_path / "model.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="model.gguf cannot be read"):
        LlamaDecoder(tmp_path / "model.gguf", threads=1, context=8, gpu=False)
    if not llama_cpp.llama_supports_gpu_offload():
        with pytest.raises(ValueError, match="gpu"):
            LlamaDecoder(tmp_path / "model.gguf", threads=1, context=8, gpu=True)
