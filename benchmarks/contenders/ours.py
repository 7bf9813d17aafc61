"""The whole model's stages on our PaliGemma."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pg_kernels.benchmarks.cases.catalogue import ANSWER
from pg_kernels.benchmarks.cases.ops import Inputs
from pg_kernels.benchmarks.measure.timing import Candidate, TimedCall
from pg_kernels.model import PaliGemma
from pg_kernels.model.decoding import Decoder
from pg_kernels.model.graphs import GraphedFunction, Recorder, capture_unsupported_reason
from pg_kernels.nn import fuse_qkv_


def inference(call: Callable[[], Tensor], prepare: Callable[[], Any] = lambda: None) -> Candidate:
    """Return a candidate of a call without gradients whose output is judged directly."""

    def run(_: Any) -> Tensor:
        with torch.inference_mode():
            return call()

    return Candidate(TimedCall(run, prepare), lambda: [run(prepare())])


def prompt(inputs: Inputs) -> dict[str, Any]:
    return {name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask", "token_type_ids")}


def _decoder(inputs: Inputs) -> Decoder:
    batch, length = inputs["input_ids"].shape
    return Decoder(inputs["model"], batch, length + ANSWER)


def first_example(inputs: Inputs) -> Inputs:
    """Return the first example of the inputs. The batch decodes after its prompt, so that only one untimed prefill is needed."""
    return {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def siglip(inputs: Inputs) -> Candidate:
    return inference(lambda: inputs["model"].get_image_features(inputs["pixel_values"]))


def _as_generated(model: PaliGemma, stage: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a stage as `generate` runs it: a captured CUDA graph that is replayed, if graphs are possible."""
    if capture_unsupported_reason(model, next(model.parameters()).device) is not None:
        return stage
    fuse_qkv_(model)
    found: list[Tensor] = []

    def keep() -> None:
        found[:] = [stage()]

    replayed = GraphedFunction(keep, Recorder(None))

    def call() -> Tensor:
        replayed()
        return found[0]

    with torch.inference_mode():
        for _ in range(2):
            call()
    return call


def prefill(inputs: Inputs) -> Candidate:
    model, decoder = inputs["model"], _decoder(inputs)
    return inference(_as_generated(model, lambda: model.logits(decoder.prefill(model, prompt(inputs)))))


def decode_step(inputs: Inputs) -> Candidate:
    model, first = inputs["model"], first_example(inputs)
    decoder = _decoder(first)
    with torch.inference_mode():
        decoder.prefill(model, prompt(first))
        decoder.select_rows(torch.zeros_like(inputs["suffix"][:, 0]))
        decoder.tokens.copy_(inputs["suffix"][:, 0])
        start = {name: lengths.clone() for name, lengths in vars(decoder.lengths).items()}

    @torch.inference_mode()
    def rewind() -> None:
        for name, lengths in start.items():
            getattr(decoder.lengths, name).copy_(lengths)

    return inference(_as_generated(model, lambda: model.logits(decoder.step(model))), rewind)


def generate(inputs: Inputs) -> Candidate:
    model = inputs["model"]
    return inference(lambda: model.generate(**prompt(inputs), max_new_tokens=ANSWER, eos_token_id=-1))


def training_inputs(inputs: Inputs) -> dict[str, Tensor]:
    ids, suffix = inputs["input_ids"], inputs["suffix"]
    return {
        "input_ids": torch.cat((ids, suffix), 1),
        "pixel_values": inputs["pixel_values"],
        "attention_mask": torch.ones(len(ids), ids.shape[1] + suffix.shape[1], dtype=torch.int64, device=ids.device),
        "token_type_ids": torch.cat((torch.zeros_like(ids), torch.ones_like(suffix)), 1),
        "labels": torch.cat((torch.full_like(ids, -100), suffix), 1),
    }


def finetune_step(model: nn.Module, inputs: Inputs) -> Candidate:
    """Return a candidate of forward, loss and all gradients, without the optimizer, which is the same for all contenders."""
    batch = training_inputs(inputs)
    owner = inputs["model"].model  # the parameters are shared
    last = owner.language_model.layers[-1]
    watched = [owner.multi_modal_projector.linear.weight, last.mlp.down_proj.weight, last.self_attn.q_proj.weight]

    def forget() -> None:
        model.zero_grad(set_to_none=True)

    def run(_: Any) -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    def results() -> list[Tensor]:
        forget()
        found = [run(None), *(parameter.grad for parameter in watched)]
        forget()
        return found

    return Candidate(TimedCall(run, forget), results)
