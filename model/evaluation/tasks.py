"""The tasks: each one's file format, prompt and metrics."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..locations import Detection, object_score, parse, parse_places
from ..processor import Processor
from . import metrics
from .formats import coco, text
from .formats.questions import Options, Question, Read, Region, decode_masks

QUESTION = "answer {lang} {question}"


@dataclass(frozen=True)
class Answer:
    """A model's answer and, if requested, the probability of each of its location tokens in order."""

    text: str
    location_probabilities: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Source:
    """The source of questions: a file, VQAv2's annotations file, the language of captions."""

    path: Path
    annotations: Path | None
    language: str


@dataclass(frozen=True)
class Task:
    """One task of `pg-kernels evaluate`."""

    read: Callable[[Source], Read]
    prompt: str
    """The released models' prompt: a template of the questions' fields and `lang`."""
    max_new_tokens: int
    score: Callable[[Sequence[Question], Sequence[Answer], Processor], dict[str, float]]
    packages: tuple[str, ...] = ()
    """The packages of the extra `evaluate` that scoring needs."""
    finds: bool = False
    """Whether scoring needs the probabilities of location tokens."""
    group: int = 1
    """The number of consecutive questions that belong together."""


def _scorer(*scores: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """Return a task's score function from metrics on texts. Scores of groups of questions, if there are any, follow."""

    def score(questions: Sequence[Question], answers: Sequence[Answer], _: Processor) -> dict[str, float]:
        kinds: dict[str, list[int]] = defaultdict(list)
        for i, question in enumerate(questions):
            kinds[question.kind].append(i)
        texts = [answer.text for answer in answers]
        references = [question.reference for question in questions]
        result = {name: value for metric in scores for name, value in metric(texts, references).items()}
        for kind in sorted(filter(None, kinds)):
            texts_of, references_of = ([values[i] for i in kinds[kind]] for values in (texts, references))
            result |= {f"{name} {kind}": x for metric in scores for name, x in metric(texts_of, references_of).items()}
        return result

    return score


def _score_choices(questions: Sequence[Question], answers: Sequence[Answer], _: Processor) -> dict[str, float]:
    choices: list[Options] = [question.reference for question in questions]
    chosen = [metrics.chosen_option(answer.text, choice.texts) for answer, choice in zip(answers, choices)]
    return metrics.pair_accuracy([index == choice.right for index, choice in zip(chosen, choices)])


def _score_detections(questions: Sequence[Question], answers: Sequence[Answer], _: Processor) -> dict[str, float]:
    found = [list(_found(answer, question.reference.size)) for question, answer in zip(questions, answers)]
    return metrics.average_precision(
        [[thing for thing, _ in objects] for objects in found],
        [question.reference.objects for question in questions],
        scores=[[score for _, score in objects] for objects in found],
        crowds=[question.reference.crowds for question in questions],
    )


def _found(answer: Answer, size: tuple[int, int]) -> Iterator[tuple[Detection, float]]:
    """Yield the objects of an answer, each with its score from the probabilities of its four location tokens."""
    probabilities = answer.location_probabilities or ()
    for place, thing in parse_places(answer.text, size):
        first = len(re.findall("<loc[0-9]{4}>", answer.text[:place]))
        score = object_score(probabilities[first : first + 4]) if probabilities[first : first + 4] else 0.0
        yield Detection(thing.label.lower(), thing.box), score


def _score_segmentations(
    questions: Sequence[Question], answers: Sequence[Answer], processor: Processor
) -> dict[str, float]:
    """Score the union of the masks of each category in each image; also the mean over categories of their means."""
    overlaps: dict[str, list[float]] = defaultdict(list)
    missing = 0
    pairs = zip(questions, answers)
    for question, answer in tqdm(pairs, total=len(questions), desc="scoring masks", delay=1.0, disable=None):
        region: Region = question.reference
        masks = [thing.mask for thing in processor.parse(answer.text, region.size) if thing.mask is not None]
        counted = ~decode_masks(region.ignored, region.size)
        wanted = decode_masks(region.masks, region.size) & counted
        overlaps[question.kind].append(
            metrics.mask_iou(np.logical_or.reduce(masks) & counted, wanted) if masks else 0.0
        )
        missing += not masks
    means = [float(np.mean(values)) for values in overlaps.values()]
    everything = [value for values in overlaps.values() for value in values]
    return {
        "mean_iou": float(np.mean(everything)),
        "mean_iou of categories": float(np.mean(means)),
        "missing": missing / len(questions),
    }


def _score_references(
    questions: Sequence[Question], answers: Sequence[Answer], processor: Processor
) -> dict[str, float]:
    """Score an answer's first object only, as big_vision's evaluator does."""
    regions: list[Region] = [question.reference for question in questions]
    firsts = [answer.text.split(";")[0] for answer in answers]
    boxes = [next((thing.box for thing in parse(text, region.size)), None) for text, region in zip(firsts, regions)]
    scores = metrics.box_accuracy(boxes, [region.box for region in regions if region.box is not None])
    if not regions[0].masks:
        return scores
    # Yield one pair at a time: all masks of a data set would take gigabytes.
    pairs = tqdm(zip(firsts, regions), total=len(regions), desc="scoring masks", delay=1.0, disable=None)
    found = (next((thing.mask for thing in processor.parse(text, region.size)), None) for text, region in pairs)
    return metrics.mean_iou(found, (decode_masks(region.masks, region.size) for region in regions)) | scores


_DOCUMENT_TASK = Task(
    lambda source: text.read_docvqa(source.path),
    QUESTION,
    64,
    _scorer(metrics.anls, metrics.exact_match),
    ("rapidfuzz",),
)


TASKS: Mapping[str, Task] = {
    "caption": Task(
        lambda source: text.read_captions(source.path, source.language),
        "caption {lang}",
        64,
        _scorer(metrics.caption_scores),
        ("pycocoevalcap",),
    ),
    "vqa": Task(
        lambda source: text.read_vqa(source.path, source.annotations),
        QUESTION,
        32,
        _scorer(metrics.vqa_accuracy),
    ),
    "gqa": Task(
        lambda source: text.read_gqa(source.path),
        QUESTION,
        32,
        _scorer(metrics.exact_match),
    ),
    "docvqa": _DOCUMENT_TASK,
    "infovqa": _DOCUMENT_TASK,
    "stvqa": _DOCUMENT_TASK,
    "chartqa": Task(
        lambda source: text.read_chartqa(source.path),
        QUESTION,
        48,
        _scorer(metrics.relaxed_accuracy, metrics.exact_match),
    ),
    "ocr": Task(
        lambda source: text.read_lines(source.path, "ocr"),
        "{prefix}",
        256,
        _scorer(metrics.exact_match, metrics.character_error_rate),
        ("rapidfuzz",),
    ),
    "detect": Task(
        lambda source: coco.read_detection(source.path),
        "detect {categories}",
        256,
        _score_detections,
        ("pycocotools",),
        finds=True,
    ),
    "refer": Task(
        lambda source: coco.read_referring(source.path),
        "{verb} {expression}",
        48,
        _score_references,
        ("pycocotools",),
    ),
    "segment": Task(
        lambda source: coco.read_segmentation(source.path),
        "segment {category}",
        256,
        _score_segmentations,
        ("pycocotools",),
    ),
    "mmvp": Task(
        lambda source: text.read_mmvp(source.path),
        QUESTION,
        32,
        _score_choices,
        group=2,
    ),
    "pope": Task(
        lambda source: text.read_pope(source.path),
        QUESTION,
        32,
        _scorer(metrics.yes_no_scores),
    ),
    "jsonl": Task(
        lambda source: text.read_lines(source.path),
        "{prefix}",
        64,
        _scorer(metrics.exact_match),
    ),
}
