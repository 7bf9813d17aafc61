"""The stages of whole models in the suite, on a PaliGemma so small that they take no time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pg_kernels import backend
from pg_kernels.benchmarks.cases import models
from pg_kernels.benchmarks.cases.catalogue import ANSWER, WHOLE_MODEL_OPS, Case
from pg_kernels.benchmarks.contenders import ours
from pg_kernels.benchmarks.measure.model_trial import ModelTrial
from pg_kernels.benchmarks.measure.runner import Plan, Suite
from pg_kernels.benchmarks.measure.timing import Effort
from pg_kernels.benchmarks.report.results import Ceilings, Row
from pg_kernels.model import graphs
from pg_kernels.model.config import PaliGemmaConfig, TextConfig, VisionConfig

CPU = torch.device("cpu")
DEVICES = ["cpu", *[pytest.param("cuda", marks=pytest.mark.cuda)] * torch.cuda.is_available()]
SHORT = Effort(0.0, 3, 3)
LIMITS = Ceilings(1e10, 1e10, {"float32": 1e11})
GEMMA = TextConfig(
    vocab_size=16_384,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=32,
)
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    num_key_value_heads=2,
    query_pre_attn_scalar=32,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    sliding_window=4096,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def named(name: str) -> PaliGemmaConfig:
        text = GEMMA2 if name.startswith("paligemma2") else GEMMA
        vision = VisionConfig(48, 80, 2, 3, int(name.rpartition("-")[2]) // 4, 14)
        return PaliGemmaConfig(vision, text, image_token_id=text.vocab_size - 1)

    monkeypatch.setattr(PaliGemmaConfig, "named", named)
    yield
    models.release()


def case(op: str, model: str = "paligemma-3b", batch: int = 1) -> Case:
    mode = "both" if op == "finetune_step" else "forward"
    return Case(op, mode, "float32", "tiny", {"model": model, "resolution": 224, "batch": batch}, quick=True)


def run(wanted: Case, device: str) -> dict[str, Row]:
    plan = Plan(ops=SHORT, models=SHORT, longest_s=10.0)
    return {row.contender: row for row in Suite(torch.device(device), plan, LIMITS).run(wanted)}


@pytest.mark.parametrize("model", ["paligemma-3b", "paligemma2-3b"])
@pytest.mark.parametrize("op", WHOLE_MODEL_OPS)
@pytest.mark.parametrize("device", DEVICES)
def test_transformers_does_the_same_on_the_same_weights(device: str, op: str, model: str) -> None:
    rows = run(case(op, model, batch=2), device)
    for name in ("pg_kernels", "transformers sdpa", "transformers eager"):
        # transformers' SDPA has no softcap. Its Gemma 2 ignores the softcap unless attention is eager.
        if name == "transformers sdpa" and model == "paligemma2-3b" and rows[name].status != "timed":
            continue
        assert rows[name].status == "timed", rows[name]
        assert len(rows[name].samples) == 3 and rows[name].peak_bytes
        assert rows[name].error is not None and rows[name].error < 0.2, rows[name]
    assert rows["transformers sdpa"].baseline and rows["pg_kernels"].ours
    if op == "generate" and device == "cpu":
        assert rows["transformers compiled, static cache"].reason == "transformers compiles on CUDA only"


@pytest.mark.parametrize("op", ["prefill", "decode_step", "finetune_step", "generate"])
def test_a_wrong_mask_is_noticed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = ModelTrial(case(op, batch=4), CPU)
    trial.draw()
    right = trial.inputs["model"].attention_lengths

    def causal(ids: Tensor, mask: Tensor | None, types: Tensor | None) -> Any:
        visible, positions = right(ids, mask, types)
        return replace(visible, prefix_lens=torch.zeros_like(visible.prefix_lens)), positions

    contender = trial.contenders()[0]
    assert trial.error(contender, trial.build(contender)[0].results()) <= 1
    monkeypatch.setattr(trial.inputs["model"], "attention_lengths", causal)
    results = trial.build(contender)[0].results()
    monkeypatch.setattr(trial.inputs["model"], "attention_lengths", right)
    assert trial.error(contender, results) > 1


def test_a_decode_step_can_be_repeated() -> None:
    trial = ModelTrial(case("decode_step"), CPU)
    trial.draw()
    for contender in trial.contenders()[:2]:
        candidate = trial.build(contender)[0]
        first, second = candidate.results(), candidate.results()
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("op", ["prefill", "decode_step"])
def test_stages_are_replayed_where_there_are_graphs(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage is captured before it is timed, as in `generate`. A stand-in for the graph runs the stage at each replay."""
    trial = ModelTrial(case(op, batch=2), CPU)
    trial.draw()
    captured = []

    def capture(function: Callable[[], None], generator: None, pool: None) -> Any:
        captured.append(function)
        return SimpleNamespace(replay=function, pool=lambda: None)

    monkeypatch.setattr(ours, "capture_unsupported_reason", lambda model, device: None)
    monkeypatch.setattr(graphs, "capture", capture)
    contender = trial.contenders()[0]
    candidate = trial.build(contender)[0]
    assert len(captured) == 1
    for _ in range(2):
        assert trial.error(contender, candidate.results()) <= 1
    candidate.task.run(candidate.task.prepare())
    assert len(captured) == 1


@pytest.mark.parametrize("op", ["siglip", "prefill", "decode_step", "finetune_step"])
@pytest.mark.parametrize("model", ["paligemma-3b", "paligemma2-3b"])
def test_flops_are_those_of_the_matrix_products(op: str, model: str) -> None:
    trial = ModelTrial(case(op, model, batch=2), CPU)
    trial.draw()
    task = trial.build(trial.contenders()[0])[0].task
    state = task.prepare()
    # The counter counts matrix products. On a CPU, scaled_dot_product_attention hides its own.
    with backend("reference"), FlopCounterMode(display=False) as counter:
        task.run(state)
    counted, expected = counter.get_total_flops(), trial.work(trial.contenders()[0])[1]
    if op == "finetune_step":  # the counter does not see into linear_cross_entropy
        counted += 3 * 2 * 2 * ANSWER * GEMMA.hidden_size * GEMMA.vocab_size
    # Attention that builds its scores also computes masked ones, and the cache is longer than its content.
    assert expected <= 1.001 * counted and counted <= 1.25 * expected


def test_bytes_of_a_decode_step_are_its_weights_and_its_cache() -> None:
    trial = ModelTrial(case("decode_step", batch=2), CPU)
    text = trial.config.text_config
    layer = 64 * (2 * 128 + 2 * 32 + 3 * 96) + 2 * 64
    weights = text.vocab_size * 64 + 3 * layer + 64
    cache = 2 * (16 + 16) * 3 * 2 * 32
    assert trial.work(trial.contenders()[0])[0] == 4 * (weights + cache)


def test_one_model_is_shared_and_only_one_is_held() -> None:
    first, second = ModelTrial(case("prefill"), CPU), ModelTrial(case("decode_step"), CPU)
    needed = first.needed_bytes()
    first.draw()
    second.draw()
    assert first.inputs["model"] is second.inputs["model"]
    assert second.needed_bytes() < needed
    ModelTrial(case("prefill", "paligemma2-3b"), CPU).draw()
    assert len(models._held) == 1


def test_weights_keep_the_variance() -> None:
    trial = ModelTrial(case("prefill"), CPU)
    trial.draw()
    features = trial.inputs["model"].get_image_features(trial.inputs["pixel_values"])
    assert 0.3 < float(features.detach().std()) < 3
    rows = trial.inputs["model"].lm_head.weight
    assert not torch.equal(rows[0], rows[1])
