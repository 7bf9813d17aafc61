"""The built-in model on its samples and on unseen pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pg_kernels.model import EMBEDDED_CHECKPOINT, PaliGemma, Processor
from pg_kernels.model.embedded.evaluation import ZERO_SHOT, evaluate
from pg_kernels.model.embedded.tasks import Questions
from pg_kernels.model.embedded.world import World

SAMPLE = EMBEDDED_CHECKPOINT / "samples" / "banana_and_owl.png"
SAMPLE_OBJECTS = {"banana": (2, 97, 167, 284), "owl": (211, 112, 330, 269)}
EMOJI = Path(__file__).parents[1] / "fixtures" / "emoji.npz"


@pytest.fixture(scope="module")
def model() -> PaliGemma:
    return PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(EMBEDDED_CHECKPOINT)


@pytest.fixture(scope="module")
def questions(processor: Processor) -> Questions:
    """Return questions about the model's world. Its stored pictures need no emoji font."""
    stored = np.load(EMOJI)
    return Questions(World(glyphs={name: Image.fromarray(stored[name]) for name in stored}), processor.mask_decoder)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED_CHECKPOINT.rglob("*")) < 12e6


def test_caption_of_the_sample(model: PaliGemma, processor: Processor) -> None:
    answer = processor.decode(model.generate(**processor(SAMPLE, "caption en"), max_new_tokens=32))
    assert answer == ["a banana and an owl"]


@pytest.mark.parametrize("name", SAMPLE_OBJECTS)
def test_boxes_in_the_sample(model: PaliGemma, processor: Processor, name: str) -> None:
    answer = processor.decode(model.generate(**processor(SAMPLE, f"detect {name}"), max_new_tokens=32))[0]
    (found,) = processor.parse(answer, size=Image.open(SAMPLE).size)
    assert found.label == name
    assert intersection_over_union(found.box, SAMPLE_OBJECTS[name]) > 0.5


def intersection_over_union(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    inner = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return inner / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - inner)


@pytest.mark.parametrize(
    ("task", "language", "floor"),
    [
        ("caption", "en", 0.83),
        ("caption", "fr", 0.83),
        (ZERO_SHOT, "en", 0.91),
        ("vqa", "en", 0.88),
        ("count", "en", 0.79),
        ("chart", "en", 0.81),
        ("compare", "en", 0.72),
        ("ocr", "", 0.81),
        ("detect", "", 0.73),
        ("segment", "", 0.70),
    ],
)
def test_fresh_pictures(
    model: PaliGemma, processor: Processor, questions: Questions, task: str, language: str, floor: float
) -> None:
    """The floors lie about three standard deviations (of this few questions) below the model card's scores."""
    (score,) = evaluate(model, processor, questions, count=40, seed=2, rows=[(task, language)])
    assert score.value >= floor


def test_it_loads_in_transformers(model: PaliGemma, processor: Processor) -> None:
    from transformers import PaliGemmaForConditionalGeneration

    theirs = PaliGemmaForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)
    inputs = processor(SAMPLE, "caption en")
    expected = theirs.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    actual = model.generate(**inputs, max_new_tokens=16)[0]
    assert torch.equal(actual, expected[: len(actual)])
