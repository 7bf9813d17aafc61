"""End-to-end runs of whole models, on a tiny checkpoint."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from pg_kernels.benchmarks.__main__ import main
from pg_kernels.benchmarks.cases.catalogue import ANSWER
from pg_kernels.benchmarks.measure.model_trial import LARGEST_REGRET
from pg_kernels.benchmarks.report.results import Ceilings
from pg_kernels.benchmarks.sessions import end_to_end as sessions
from pg_kernels.benchmarks.sessions import end_to_end_process
from pg_kernels.benchmarks.sessions.end_to_end import markdown
from pg_kernels.benchmarks.sessions.end_to_end_process import CONTENDERS, Part, TimedAnswer
from pg_kernels.model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig

TEXT = TextConfig(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
CONFIG = PaliGemmaConfig(VisionConfig(32, 48, 2, 2, image_size=28), TEXT, image_token_id=511)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    PaliGemma(CONFIG).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sessions.contenders(CPU))
def test_a_session(checkpoint: Path, name: str) -> None:
    found = end_to_end_process.run(name, checkpoint, CPU, [1, 3], None)
    assert found.load_s > 0 and list(found.answers) == [1, 3]
    for answer in found.answers.values():
        assert answer is not None and answer.first_token_s > 0 and answer.tokens_per_s > 0 and answer.peak_bytes > 1e7
        assert len(answer.tokens) == ANSWER
        assert bool(answer.parts) == name.startswith("pg_kernels")
        for part, took in answer.parts.items():
            assert took.prefill_s > 0 and took.decode_s >= 0, part
        if answer.parts:  # an image is encoded once
            assert answer.parts["image encoder, MLP"].decode_s == 0 < answer.parts["decoder, MLP"].decode_s


def stored(answers: dict[str, Any], **rest: Any) -> dict[str, Any]:
    found = [{"load_s": 1.0, "answers": answers}]
    return {
        "model": "tiny", "device": "here", "versions": {"torch": "2"}, "command": "this", "failed": {}, "regrets": {},
        "bounds": {}, "sessions": {"pg_kernels int8": found * 3, sessions.BASELINE: found}, **rest,
    }  # fmt: skip


def answer(first: float, rate: float, parts: dict[str, Part] | None = None) -> dict[str, Any]:
    return asdict(TimedAnswer(first, rate, 2 * 10**9, [1, 2], parts or {}))


def test_tables_of_parts() -> None:
    parts = {"decoder, MLP": Part(2.0, 0.5), "norms": Part(1.0, 0.0)}
    content = stored({"1": answer(3.0, 2.0, parts)})
    content["sessions"][sessions.BASELINE] = [{"load_s": 1.0, "answers": {"1": answer(6.0, 1.0)}}]
    content["bounds"] = {"pg_kernels int8": {"1": {"decoder, MLP": asdict(Part(1.0, 0.1))}}}
    text = markdown(content)
    assert "| pg_kernels int8 | 1 | 1.00 s | 3.00 s (0.50×) | 2.00 (2.00×) | 2.00 GB |" in text
    assert f"| {sessions.BASELINE} | 1 | 1.00 s | 6.00 s | 1.00 | 2.00 GB |" in text
    assert "| decoder, MLP | 2.00 s | 1.00 s | 50% | 500 ms | 100 ms | 20% |" in text
    assert "| norms | 1.00 s | – | – | – | – | – |" in text
    assert "| sum | 3.00 s | 1.00 s | 33% | 500 ms | 100 ms | 20% |" in text
    assert "launches" not in text and "goes with 1 prompt," in text


def test_tables_of_kernels() -> None:
    """Runs on a GPU have no bounds. A batch may not fit its memory, and a process may fail."""
    parts = {"forward": Part(2.0, 0.25, 18.0), "between kernels": Part(0.5, 0.25)}
    content = stored({"8": answer(3.0, 2.0, parts), "32": None})
    content["bounds"] = {"pg_kernels int8": {"8": {"decoder, MLP": asdict(Part(1.0, 0.1))}}}
    content["sessions"]["transformers, compiled"] = []
    content["failed"] = {"transformers, compiled": "it has no compiler"}
    content["regrets"] = {"pg_kernels int8": 0.05, sessions.BASELINE: 0.7}
    text = markdown(content)
    assert "| pg_kernels int8 | 32 | 1.00 s | out of memory | out of memory | – |" in text
    assert "| forward | 2.00 s | – | – | 250 ms | – | – | 18 |" in text
    assert "| between kernels | 500 ms | – | – | 250 ms | – | – | – |" in text
    assert "| sum | 2.50 s | 1.00 s | 40% | 500 ms | 100 ms | 20% | – |" in text
    assert "transformers, compiled failed: it has no compiler" in text and "goes with 8 prompts," in text
    assert f"{sessions.BASELINE} gave wrong tokens: one of them is 0.70 standard deviations" in text
    assert "pg_kernels int8 gave wrong" not in text


@pytest.mark.parametrize("name", ["pg_kernels int8", "transformers bfloat16"])
def test_how_a_gpu_is_clocked(checkpoint: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole answers and the profiler's kernels. Here, operators of a CPU stand for kernels."""
    monkeypatch.setitem(end_to_end_process.TOKENS, "cpu", 7)
    monkeypatch.setattr(end_to_end_process, "KERNELS", 1000)
    contender = CONTENDERS[name]
    load = end_to_end_process._load_ours if contender.package == "pg_kernels" else end_to_end_process._load_theirs
    model, trace = load(checkpoint, contender, CPU), tmp_path / "new" / "trace.json.gz"
    inputs = end_to_end_process.prompts(model.config, 2, CPU)
    found = end_to_end_process._clocked(model, contender, inputs, CPU, trace)
    assert found.first_token_s > 0 and found.tokens_per_s > 0 and len(found.tokens) == 7
    if contender.package == "transformers":
        assert not found.parts and not trace.exists()
        return
    # Each layer launches one for each of the six tokens after the first.
    assert found.parts["int8_geglu"].launches == TEXT.num_hidden_layers and found.parts["int8_geglu"].decode_s > 0
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]


def test_kernels_of_a_further_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A further token takes the difference of a long and a short answer. The slowest kernels are listed, then the gaps."""
    seen = {
        "one": {"gemm": (1.0, 10), "norm": (0.5, 4), "encoder": (2.0, 5)},
        "all": {"gemm": (2.0, 30), "norm": (0.9, 8), "encoder": (2.1, 5), "head": (0.2, 4)},
    }
    monkeypatch.setattr(end_to_end_process, "_profiled", lambda call, device, trace=None: seen[call()])
    monkeypatch.setattr(end_to_end_process, "KERNELS", 2)
    found = end_to_end_process._kernels(lambda: "one", lambda: "all", CPU, 4, Part(5.0, 0.5), None)
    assert list(found) == ["gemm", "norm", "other kernels", "between kernels"]
    assert found["gemm"] == Part(1.0, 0.25, 5.0)
    assert found["norm"] == Part(0.5, pytest.approx(0.1), 1.0)
    assert found["other kernels"] == Part(2.0, pytest.approx(0.05), 1.0)
    assert found["between kernels"] == Part(1.5, pytest.approx(0.1))


def test_a_kernel_by_a_name_that_fits_into_a_table() -> None:
    assert end_to_end_process.short_name("nvjet_tst_64x8_64x16_4x1_v_bz_TNT") == "nvjet_tst_64x8_64x16_4x1_v_bz_TNT"
    ours = "void pg_kernels::cuda::(anonymous namespace)::few_rows_kernel<pg_kernels::cuda::BFloat16, 1, 1>(Product)"
    assert end_to_end_process.short_name(ours) == "few_rows_kernel"
    add = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, A>(int, B)"
    assert end_to_end_process.short_name(add) == "vectorized_elementwise_kernel<CUDAFunctor_add>"
    assert end_to_end_process.short_name("Memcpy DtoD (Device -> Device)") == "Memcpy DtoD"


def test_the_first_prompt_is_in_every_batch() -> None:
    one, three = (end_to_end_process.prompts(CONFIG, batch, CPU) for batch in (1, 3))
    assert all(torch.equal(one[name][0], three[name][0]) for name in one)
    assert not torch.equal(three["input_ids"][0], three["input_ids"][1])


def test_the_clocks_leave_the_model_as_it_was(checkpoint: Path) -> None:
    model = PaliGemma.from_pretrained(checkpoint)
    contender = CONTENDERS["pg_kernels bfloat16"]
    end_to_end_process._breakdown(model, contender, end_to_end_process.prompts(model.config, 1, CPU))
    assert "topk_logits" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bounds_are_those_of_bytes_or_products() -> None:
    config = PaliGemmaConfig.named("paligemma-3b-224")
    slow_memory, slow_products = (
        Ceilings(1e9, 1e9, {"bfloat16": 1e18}),
        Ceilings(1e18, 1e18, {"bfloat16": 1e12, "int8": 2e12}),
    )
    decoder = 18 * (2 * 2048 * (2048 + 256) + 3 * 2048 * 16384) + 2048 * 257_216
    for quantize, itemsize in ((None, 2), ("int8", 1)):
        for batch in (1, 8):
            cache = batch * 18 * 2 * 256 * 272 * 2
            found = sessions.bounds(config, quantize, slow_memory, batch)
            assert sum(part.decode_s for part in found.values()) == pytest.approx((decoder * itemsize + cache) / 1e9)
    products = {q: sessions.bounds(config, q, slow_products) for q in (None, "int8", "int8-dynamic")}
    assert products[None] == products["int8"]
    for name, part in products["int8-dynamic"].items():
        assert part.prefill_s == pytest.approx(products["int8"][name].prefill_s / 2)
    assert products[None]["decoder, MLP"].prefill_s == pytest.approx((17 * 272 + 1) * 6 * 2048 * 16384 / 1e12)
    eight = sessions.bounds(config, None, slow_products, 8)
    for name, part in products[None].items():
        assert eight[name] == Part(pytest.approx(8 * part.prefill_s), pytest.approx(8 * part.decode_s)), name


def test_a_run_is_stored(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables name failed contenders and wrong tokens."""
    monkeypatch.setattr(sessions, "ceilings", lambda device: Ceilings(1e9, 1e9, {"bfloat16": 1e12}))
    monkeypatch.setattr(PaliGemmaConfig, "named", lambda name: CONFIG)
    in_a_process = sessions._in_a_process

    def all_but_one(name: str, *rest: Any) -> Any:
        if name == sessions.BASELINE:
            raise RuntimeError("it cannot")
        return in_a_process(name, *rest)

    monkeypatch.setattr(sessions, "_in_a_process", all_but_one)
    names = ["pg_kernels bfloat16", sessions.BASELINE]
    options = {"device": CPU, "batches": [2], "rounds": 1, "names": names, "command": "this"}
    content = sessions.run("tiny", tmp_path / "run", **options)
    assert json.loads((tmp_path / "run" / "session.json").read_text()) == content
    assert content["failed"] == {sessions.BASELINE: "it cannot"}
    assert 0 <= content["regrets"]["pg_kernels bfloat16"] < LARGEST_REGRET
    text = (tmp_path / "run" / "session.md").read_text()
    assert text == markdown(content) + "\n" and "| pg_kernels bfloat16 | 2 | " in text
    assert "; medians of 1 process each, in random order:" in text
    content["sessions"]["pg_kernels bfloat16"] *= 2
    assert "; medians of 2 processes each, in random order:" in markdown(content)


def test_wrong_tokens_are_found(checkpoint: Path) -> None:
    model = PaliGemma.from_pretrained(checkpoint)
    inputs = end_to_end_process.prompts(CONFIG, 1, CPU)
    right = model.generate(**inputs, max_new_tokens=3, eos_token_id=-1)[0].tolist()
    found = {
        name: [{"answers": {"1": {"tokens": tokens}, "8": None}}]
        for name, tokens in {"right": right, "wrong": [right[0], (right[1] + 1) % 512, right[2]]}.items()
    }
    regrets = sessions._regrets(found, model)
    assert regrets["right"] < LARGEST_REGRET < regrets["wrong"]


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="^pg_kernels int8: FileNotFoundError: .*config.json does not exist"):
        sessions._in_a_process("pg_kernels int8", tmp_path, CPU, [1], tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--batch", "8", "--batch", "0"], "--batch: expected at least 1, got 0"),
        pytest.param(
            ["--device", "cuda"],
            "--device: torch finds no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_options_that_cannot_be(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["session", str(tmp_path / "run"), *options]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
