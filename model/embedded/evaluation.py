"""Scores of a model in its world: each task's metric, by language, on images that training never draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from ..evaluation.metrics import average_precision, exact_match, mean_iou, relaxed_accuracy
from ..paligemma import PaliGemma
from ..processor import Processor
from .tasks import LANGUAGES, Exercise, Questions

ZERO_SHOT = "caption, zero-shot"
"""The task of emoji pairs that never occur together in training, in sizes that training never draws."""

_MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Score:
    """One row of the table: `value` of a metric, 1 at best, over `count` questions; "" for a language that does not matter."""

    task: str
    language: str
    metric: str
    value: float
    count: int


def evaluate(
    model: PaliGemma,
    processor: Processor,
    questions: Questions,
    *,
    count: int,
    seed: int,
    rows: Collection[tuple[str, str]] | None = None,
    batch_size: int = 32,
) -> list[Score]:
    """Ask `count` questions of each task, and captions in each language, about fresh images, and score the greedy answers.

    `rows` selects from `table_rows` by (task, language); default: all. Raises ValueError for unknown rows, RuntimeError without
    `pycocotools` (this package's `evaluate` extra) if boxes are scored.
    """
    there = table_rows(questions, processor.image_size)
    if rows is not None and (unknown := set(rows) - set(there)):
        raise ValueError(f"rows: {sorted(unknown)}; there are {list(there)}")
    chosen = {key: draw for key, draw in there.items() if rows is None or key in rows}
    scores = []
    with tqdm(total=count * len(chosen), desc="evaluating", unit="question", disable=None) as bar:
        for (task, language), draw in chosen.items():
            examples: list[Exercise] = []
            answers: list[str] = []
            while len(examples) < count:
                first = len(examples)
                more = [
                    draw(held_out_rng(seed, task, language, i)) for i in range(first, min(first + batch_size, count))
                ]
                examples += more
                answers += answer(model, processor, more)
                bar.update(len(more))
            scores.append(score(task, language, examples, answers, processor))
    return scores


def table_rows(questions: Questions, size: int) -> dict[tuple[str, str], Callable[[random.Random], Exercise]]:
    """Return a function that draws an example for every row of the table, by task and language."""

    def captions(language: str, held_out: bool = False) -> Callable[[random.Random], Exercise]:
        return lambda rng: questions.caption(questions.world.scene(rng, size, held_out=held_out), language)

    rows = {("caption", language): captions(language) for language in LANGUAGES}
    rows[ZERO_SHOT, "en"] = captions("en", held_out=True)
    rows["vqa", "en"] = lambda rng: questions.vqa(rng, questions.world.scene(rng, size))
    rows["count", "en"] = lambda rng: questions.count(rng, questions.world.crowd(rng, size))
    rows["chart", "en"] = lambda rng: questions.charts(rng, size)[0]
    rows["compare", "en"] = lambda rng: questions.compare(rng, size)[0]
    rows["ocr", ""] = lambda rng: questions.ocr(rng, size)
    rows["detect", ""] = lambda rng: questions.detect(rng, questions.world.scene(rng, size))
    if questions.codec is not None:
        rows["segment", ""] = lambda rng: questions.segment(rng, questions.world.scene(rng, size))
    return rows


def held_out_rng(seed: int, *place: object) -> random.Random:
    """Return the random source of a held-out image, which no training batch uses."""
    return random.Random(f"held out {seed} {' '.join(map(str, place))}")


def answer(model: PaliGemma, processor: Processor, examples: Sequence[Exercise]) -> list[str]:
    """Return the model's greedy answers to examples with the same number of images."""
    device = next(model.parameters()).device
    inputs = processor([list(example.images) for example in examples], [example.prefix for example in examples]).to(
        device
    )
    return processor.decode(model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS))


def score(
    task: str, language: str, examples: Sequence[Exercise], answers: Sequence[str], processor: Processor
) -> Score:
    """Score answers with the task's metric."""
    expected = [[example.suffix] for example in examples]
    if task == "detect":
        found = [
            processor.parse(text, size=example.images[0].size) for text, example in zip(answers, examples, strict=True)
        ]
        wanted = [list(example.objects) for example in examples]
        return Score(task, language, "AP50", average_precision(found, wanted)["ap50"], len(examples))
    if task == "segment":
        masks = (example.objects[0].mask for example in examples)
        value = mean_iou(_masks(examples, answers, processor), (mask for mask in masks if mask is not None))["mean_iou"]
        return Score(task, language, "mIoU", value, len(examples))
    if task == "chart":
        return Score(
            task, language, "relaxed accuracy", relaxed_accuracy(answers, expected)["relaxed_accuracy"], len(examples)
        )
    return Score(task, language, "exact match", exact_match(answers, expected)["exact_match"], len(examples))


def table(scores: Sequence[Score]) -> str:
    """Return the scores as a Markdown table."""
    lines = ["| task | language | metric | score | questions |", "|---|---|---|---|---|"]
    lines += [f"| {s.task} | {s.language} | {s.metric} | {s.value:.1%} | {s.count} |" for s in scores]
    return "\n".join(lines)


def _masks(examples: Sequence[Exercise], answers: Sequence[str], processor: Processor) -> Iterator:
    """Return the first mask of each answer, or None."""
    for example, text in zip(examples, answers, strict=True):
        found = processor.parse(text, size=example.images[0].size)
        yield found[0].mask if found else None
