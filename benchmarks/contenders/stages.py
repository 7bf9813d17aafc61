"""The stages of the whole model and their contenders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pg_kernels.benchmarks.cases.catalogue import Case
from pg_kernels.benchmarks.cases.models import in_int8
from pg_kernels.benchmarks.cases.ops import Inputs
from pg_kernels.benchmarks.contenders import llama_cpp_stages as llama
from pg_kernels.benchmarks.contenders import ours, transformers
from pg_kernels.benchmarks.contenders.ops import Contender
from pg_kernels.benchmarks.measure.timing import Candidate
from pg_kernels.quantization import ACTIVATIONS


@dataclass(frozen=True)
class ModelStage:
    """One op of the whole model: functions from inputs to candidates, for our model, transformers' and llama.cpp's."""

    ours: Callable[[Inputs], Candidate]
    theirs: Callable[[Inputs, Any], Candidate]
    """Its second argument is transformers' model."""
    llama: Callable[[Inputs], Candidate] | None = None


STAGES: dict[str, ModelStage] = {
    "siglip": ModelStage(ours.siglip, transformers.siglip),
    "prefill": ModelStage(ours.prefill, transformers.prefill, llama.prefill),
    "decode_step": ModelStage(ours.decode_step, transformers.decode_step, llama.decode_step),
    "generate": ModelStage(ours.generate, transformers.generate),
    "finetune_step": ModelStage(
        lambda inputs: ours.finetune_step(inputs["model"], inputs),
        lambda inputs, model: ours.finetune_step(model, inputs),
    ),
}
"""The stages by the cases' op names."""


def stage_contenders(case: Case, *, full: bool) -> list[Contender]:
    """Return the contenders of a case of the whole model. Contenders that take minutes to set up are included only if `full`."""
    stage = STAGES[case.op]
    found = [Contender("pg_kernels", stage.ours, ours=True)]
    if case.op != "finetune_step" and not case.sweep:
        found += [
            Contender(
                f"pg_kernels {mode}",
                partial(_ours_int8, stage, mode),
                ours=True,
                int8_weights=True,
                int8_activations=activations == "int8",
            )
            for mode, activations in ACTIVATIONS.items()
        ]
    found.append(Contender("transformers sdpa", partial(_theirs, stage, "sdpa"), "transformers", baseline=True))
    if case.sweep or not full:
        return found
    found.append(Contender("transformers eager", partial(_theirs, stage, "eager"), "transformers"))
    if case.op == "generate":
        compiled = transformers.compiled_generation
        found.append(Contender("transformers compiled, static cache", compiled, "transformers"))
    if case.op in ("decode_step", "generate"):
        theirs = partial(_theirs_int8, stage)
        found.append(Contender("transformers + torchao int8", theirs, "torchao", int8_weights=True))
    if stage.llama is not None:
        found.append(Contender("llama.cpp Q8_0 (decoder only)", stage.llama, "llama_cpp", int8_weights=True))
    return found


def _ours_int8(stage: ModelStage, mode: str, inputs: Inputs) -> Candidate:
    return stage.ours({**inputs, "model": in_int8(inputs["model"], mode)})


def _theirs(stage: ModelStage, attention: str, inputs: Inputs) -> Candidate:
    return stage.theirs(inputs, transformers.transformers_model(inputs["model"], attention))


def _theirs_int8(stage: ModelStage, inputs: Inputs) -> Candidate:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = transformers.transformers_model(inputs["model"], "sdpa")
    quantize_(model, Int8WeightOnlyConfig())
    return stage.theirs(inputs, model)
