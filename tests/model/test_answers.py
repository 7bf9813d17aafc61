"""Scores of tokens and objects, grammars, several answers to a prompt, and hooks of `generate`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pg_kernels import quantize_
from pg_kernels.model import EMBEDDED_CHECKPOINT, PaliGemma, PaliGemmaConfig, Processor, TextConfig, VisionConfig
from pg_kernels.model.embedded.demo import samples

SAMPLE = EMBEDDED_CHECKPOINT / "samples" / "banana_and_owl.png"
VISION = VisionConfig(24, 40, 1, 2, image_size=28)
TEXT = TextConfig("gemma2", 64, 32, 48, 2, 4, 2, 8, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)


def make(image_token_id: int = 64, **text: Any) -> PaliGemma:
    torch.manual_seed(0)
    config = PaliGemmaConfig(VISION, TextConfig(**{**vars(TEXT), **text}), image_token_id=image_token_id)
    return PaliGemma(config).eval()


@pytest.fixture(scope="module")
def model() -> PaliGemma:
    return make()


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(EMBEDDED_CHECKPOINT)


def prompts(images: int = 1, image_token_id: int = 64) -> dict[str, Tensor]:
    """Return two prompts of 4 placeholders for each image and 5 or 3 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.cat((torch.full((2, 4 * images), image_token_id), torch.randint(3, 60, (2, 5), generator=generator)), 1)
    mask = torch.ones_like(ids)
    ids[1] = ids[1].roll(2)
    ids[1, :2] = mask[1, :2] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.rand(2 * images, 3, 28, 28, generator=generator) * 2 - 1,
    }


@torch.no_grad()
def logits_of(model: PaliGemma, inputs: dict[str, Tensor], answers: Tensor) -> Tensor:
    """Return the logits [B, T, V] that precede the tokens of answers [B, T], from one forward without a cache."""
    ids = torch.cat((inputs["input_ids"], answers), 1)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(answers)), 1)
    types = torch.cat((torch.zeros_like(inputs["input_ids"]), torch.ones_like(answers)), 1)
    logits = model(ids, inputs["pixel_values"], mask, types).logits
    return logits[:, -answers.shape[1] - 1 : -1]


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({}, []),
        ({"num_beams": 3, "eos_token_id": [5, 9]}, []),
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.5, "top_k": 7}, [TemperatureLogitsWarper(1.5), TopKLogitsWarper(7)]),
        (
            {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
            [TemperatureLogitsWarper(1.3), TopKLogitsWarper(9), TopPLogitsWarper(0.8)],
        ),
    ],
    ids=["greedy", "beams", "drawn", "top-k", "nucleus"],
)
def test_scores_are_log_probabilities_of_the_processed_logits(
    model: PaliGemma, options: dict[str, Any], warpers: list[Callable[[Any, Tensor], Tensor]], quantised: bool
) -> None:
    model = quantize_(make()) if quantised else model
    inputs = prompts()
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=8, **{"eos_token_id": -1, **options}, return_scores=True)
    logits = logits_of(model, inputs, output.ids)
    flat = logits.flatten(0, 1)
    for warper in warpers:
        flat = warper(None, flat)
    expected = flat.view(logits.shape).log_softmax(-1).gather(2, output.ids[..., None])[..., 0]
    ended = (torch.isin(output.ids, torch.tensor(options.get("eos_token_id", []))).cumsum(1) > 0).roll(1, 1)
    ended[:, 0] = False
    torch.testing.assert_close(output.scores, expected.masked_fill(ended, 0.0), rtol=1e-4, atol=2e-5)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, **{"eos_token_id": -1, **options}), output.ids)


def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    model = make(image_token_id=63)
    model.save_pretrained(tmp_path)
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    inputs, options = prompts(image_token_id=63), {"max_new_tokens": 7}
    types = torch.zeros_like(inputs["input_ids"])
    options_of_theirs = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    found = theirs.generate(**inputs, token_type_ids=types, **options, **options_of_theirs)
    expected = theirs.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    ours = model.generate(**inputs, **options, return_scores=True)
    assert torch.equal(ours.ids, found.sequences[:, -ours.ids.shape[1] :])
    torch.testing.assert_close(ours.scores, expected, rtol=1e-4, atol=2e-5)


OBJECTS = {
    "detect": re.compile(r"((<loc\d{4}>){4}[^<>]*)*"),
    "segment": re.compile(r"((<loc\d{4}>){4}(<seg\d{3}>){16}[^<>]*)*"),
}


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("options", [{"temperature": 3.0}, {}, {"num_beams": 3}], ids=["drawn", "greedy", "beams"])
def test_every_answer_of_a_grammar_parses(processor: Processor, kind: str, options: dict[str, Any]) -> None:
    """The weights are random. Answers are cut off after any number of tokens."""
    vocabulary = processor.tokenizer.largest_text_id + 1
    model, grammar = make(image_token_id=vocabulary, vocab_size=vocabulary), processor.grammar(kind)
    inputs = {"input_ids": torch.randint(0, vocabulary, (4, 6)), "eos_token_id": 1}

    def late(answers: Tensor, logits: Tensor) -> Tensor:
        """Let answers end at the last token only. The best beams would end at once."""
        return logits - 1e4 * (answers.shape[1] < length - 1) * (torch.arange(vocabulary) == 1)

    objects = 0
    for length in (1, 2, 3, 4, 5, 9, 19, 20, 21, 44):
        ids = model.generate(**inputs, max_new_tokens=length, grammar=grammar, logits_processor=late, **options)
        for text in processor.decode(ids):
            assert OBJECTS[kind].fullmatch(text), text
            found = processor.parse(text, (640, 480))
            assert len(found) == text.count("<loc") / 4
            assert all(thing.mask is None or kind == "segment" for thing in found)
            objects += len(found)
    assert objects >= 8


def test_a_grammar_keeps_valid_answers(processor: Processor) -> None:
    model = PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT)
    for sample in samples():
        kind = sample.prefix.split()[0]
        if kind in ("detect", "segment"):
            inputs = processor([list(sample.images)], [sample.prefix])
            free = model.generate(**inputs, max_new_tokens=40)
            assert torch.equal(model.generate(**inputs, max_new_tokens=40, grammar=processor.grammar(kind)), free)


def test_a_logits_processor_sees_answers_and_changes_logits(model: PaliGemma) -> None:
    inputs, seen = prompts(), []

    def other(answers: Tensor, logits: Tensor) -> Tensor:
        seen.append(answers.clone())
        return logits.masked_fill(logits == logits.max(-1, keepdim=True).values, float("-inf"))

    ids = model.generate(**inputs, max_new_tokens=4, eos_token_id=-1, logits_processor=other)
    assert torch.equal(logits_of(model, inputs, ids).topk(2).indices[..., 1], ids)
    assert [answers.shape[1] for answers in seen] == [0, 1, 2, 3] and torch.equal(seen[3], ids[:, :3])


def test_several_answers_to_a_prompt(model: PaliGemma) -> None:
    """Draws are those of a repeated prompt, beams the best ended ones, best first."""
    inputs = prompts(images=2)
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.2}
    torch.manual_seed(0)
    answers = model.generate(**inputs, **options, num_return_sequences=3)
    torch.manual_seed(0)
    repeated = {name: tensor.repeat_interleave(3, 0) for name, tensor in inputs.items() if name != "pixel_values"}
    pixels = inputs["pixel_values"].view(2, 2, 3, 28, 28).repeat_interleave(3, 0).flatten(0, 1)
    assert torch.equal(answers, model.generate(**repeated, pixel_values=pixels, **options))
    assert len({tuple(answer) for answer in answers.tolist()}) > 2


def test_beams_return_the_best_answers(model: PaliGemma) -> None:
    """With a beam for every sequence they are the best of all sequences."""
    inputs = {name: tensor[:1] for name, tensor in prompts().items()}
    output = model.generate(
        **inputs, max_new_tokens=2, eos_token_id=5, num_beams=64, num_return_sequences=4, return_scores=True
    )
    first = logits_of(model, inputs, torch.zeros(1, 1, dtype=torch.int64))[0, 0].log_softmax(-1)
    totals = {(5, 0): float(first[5])}
    for token in range(64):
        if token != 5:
            pair = torch.tensor([[token, 5]])
            totals[token, 5] = float(first[token] + logits_of(model, inputs, pair)[0, 1].log_softmax(-1)[5])
    best = sorted(totals, key=totals.__getitem__, reverse=True)[:4]
    assert output.ids.tolist() == [list(answer) for answer in best]
    torch.testing.assert_close(
        output.scores.sum(1), torch.tensor([totals[answer] for answer in best]), rtol=1e-4, atol=1e-4
    )


def test_answers_stop_after_a_text(processor: Processor) -> None:
    model = PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT)
    inputs = processor([SAMPLE] * 2, ["caption en", "answer en how many owls are there?"])
    free = processor.decode(model.generate(**inputs, max_new_tokens=20))
    word = free[0].split()[1]
    cut = processor.decode(model.generate(**inputs, max_new_tokens=20, stop=processor.stop_at(word, "nothing")))
    assert cut[0].endswith(word) and free[0].startswith(cut[0]) and cut[0] != free[0]
    assert cut[1] == free[1]
    with pytest.raises(ValueError, match="^stop_at: "):
        processor.stop_at("")


def test_objects_have_the_probability_of_their_boxes(processor: Processor) -> None:
    """Labels of bytes, codes and objects that do not parse come between them."""
    encode = processor.tokenizer.encode
    text = "<loc0001><loc0002><loc0003> ж ; <loc0100><loc0100><loc0300><loc0400> fox ж ; <loc0010><loc0020><loc0500><loc0600>"
    ids = [*encode(text), *encode("<seg001>" * 16), *encode(" owl"), processor.tokenizer.eos_id]
    scores = torch.linspace(-0.5, -0.01, len(ids))
    first, second = ids.index(*encode("<loc0100>")), ids.index(*encode("<loc0010>"))
    found = processor.parse_answer(torch.tensor(ids), (100, 100), scores)
    assert [thing.label for thing in found] == ["fox ж", "owl"]
    expected = [math.exp(float(scores[start : start + 4].mean())) for start in (first, second)]
    assert [thing.score for thing in found] == pytest.approx(expected)
    with pytest.raises(ValueError, match="^scores: 2 for "):
        processor.parse_answer(ids, (100, 100), [0.0, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 2}, "num_return_sequences: several answers need a temperature above 0 or beams"),
        ({"num_return_sequences": 0}, "num_return_sequences: expected at least 1, got 0"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences: 3 are more than the 2 beams"),
        ({"num_beams": 2, "stop": print}, "num_beams: beam search neither draws"),
        ({"stop": "\n"}, "stop: expected a function or None, got str"),
        ({"logits_processor": 3}, "logits_processor: expected a function or None, got int"),
        ({"grammar": "detect"}, "grammar: expected a TokenGrammar or None, got str"),
    ],
)
def test_bad_options(model: PaliGemma, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        model.generate(**prompts(), **options)


def test_a_grammar_fits_its_model(model: PaliGemma, processor: Processor) -> None:
    with pytest.raises(ValueError, match=r"^grammar: its ids go up to \d+, but the model's vocabulary has 64 tokens"):
        model.generate(**prompts(), grammar=processor.grammar("detect"))
    with pytest.raises(ValueError, match="^grammar: 'caption'; allowed are 'detect', 'segment'"):
        processor.grammar("caption")
