"""Sessions of whole models, on a tiny checkpoint."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pg_kernels.benchmarks import session as sessions
from pg_kernels.benchmarks.results import Ceilings
from pg_kernels.benchmarks.session import CONTENDERS, markdown
from pg_kernels.model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig
from pg_kernels.model.checkpoints import save_huggingface

TEXT = TextConfig(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
CONFIG = PaliGemmaConfig(VisionConfig(32, 48, 2, 2, image_size=28), TEXT, image_token_id=511)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    save_huggingface(PaliGemma(CONFIG).bfloat16(), folder)
    return folder


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_session(checkpoint: Path, name: str) -> None:
    found = sessions.session(name, checkpoint)
    assert found.load_s > 0 and found.first_token_s > 0 and found.tokens_per_s > 0 and found.peak_bytes > 1e7
    assert bool(found.parts) == name.startswith("pg_kernels")
    for part, took in found.parts.items():
        assert took.prefill_s > 0 and took.decode_s >= 0, part
    if found.parts:  # an image is encoded once
        assert found.parts["image encoder, MLP"].decode_s == 0 < found.parts["decoder, MLP"].decode_s
        text = markdown({
            "model": "tiny", "bounds": {name: {"decoder, MLP": {"prefill_s": found.parts["decoder, MLP"].prefill_s / 2}}},
            "device": "here", "versions": {"torch": "2"}, "command": "this",
            "sessions": {name: [asdict(found)] * 3, sessions.BASELINE: [{**asdict(found), "parts": {}}]},
        })  # fmt: skip
        assert re.search(r"\| decoder, MLP \| [^|]+ \| [^|]+ \| 50% \| [^|]+ \| – \| – \|", text)
        assert f"| {name} | " in text and " (1.00×) | " in text and "| decoder, MLP | " in text and "| sum | " in text


def test_the_clocks_leave_the_model_as_it_was(checkpoint: Path) -> None:
    model = PaliGemma.from_pretrained(checkpoint)
    sessions._breakdown(model, sessions.prompts(model.config))
    assert "likeliest" not in vars(model)
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
        assert eight[name] == sessions.Part(pytest.approx(8 * part.prefill_s), pytest.approx(8 * part.decode_s)), name


def test_a_run_is_stored(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "ceilings", lambda device: Ceilings(1e9, 1e9, {"bfloat16": 1e12}))
    monkeypatch.setattr(PaliGemmaConfig, "named", lambda name: CONFIG)
    path = sessions.run("tiny", tmp_path / "run", rounds=1, names=["pg_kernels int8"], command="this")
    assert path == tmp_path / "run" / "session.json"
    assert "| pg_kernels int8 | " in path.with_suffix(".md").read_text()


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="^pg_kernels int8: FileNotFoundError: .*config.json does not exist"):
        sessions._in_a_process("pg_kernels int8", tmp_path)


def test_rounds_must_be_positive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pg_kernels.benchmarks.__main__ import _session

    with pytest.raises(ValueError, match="--rounds: expected at least 1, got 0"):
        _session(SimpleNamespace(rounds=0, contender=None, model="paligemma-3b-224", out=tmp_path))
