"""An evaluation from files to scores: questions, answers in batches that can be continued, scores."""

from __future__ import annotations

import hashlib
import json
import os
import string
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..added_tokens import lone_surrogate
from ..files import parse_json, write_atomically
from ..images import load_image
from ..inputs import Inputs
from ..paligemma import PaliGemma
from ..processor import Processor
from .formats.questions import Question, Region, find_images
from .tasks import TASKS, Answer, Source, Task


@dataclass(frozen=True)
class Evaluation:
    """The questions of a task, by file name, and the template of their prompts."""

    name: str
    template: str
    language: str
    subsets: Mapping[str, Sequence[Question]]

    @property
    def task(self) -> Task:
        return TASKS[self.name]

    @property
    def questions(self) -> list[Question]:
        return [question for questions in self.subsets.values() for question in questions]

    @property
    def needs_masks(self) -> bool:
        return any(isinstance(question.reference, Region) and question.reference.masks for question in self.questions)

    def prompt(self, question: Question) -> str:
        return self.template.format(**question.fields, lang=self.language)

    def digest(self) -> str:
        """Return a hash of the questions: their files' names, numbers, image names and prompts."""
        asked = [
            [file, question.id, [path.name for path in question.images], self.prompt(question)]
            for file, questions in self.subsets.items()
            for question in questions
        ]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

    def score(self, answers: Sequence[Answer], processor: Processor) -> dict[str, dict[str, float]]:
        """Return the scores of each file, and of several files their unweighted "mean"."""
        scores: dict[str, dict[str, float]] = {}
        start = 0
        for file, questions in self.subsets.items():
            try:
                scores[file] = self.task.score(questions, answers[start : start + len(questions)], processor)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
            start += len(questions)
        if len(scores) > 1:
            first, *others = scores.values()
            names = [name for name in first if all(name in other for other in others)]
            scores["mean"] = {name: sum(each[name] for each in scores.values()) / len(scores) for name in names}
        return scores


def prepare(
    name: str,
    data: Sequence[Path],
    *,
    annotations: Path | None = None,
    images: Path | None = None,
    language: str = "en",
    prompt: str | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Read and check everything that an evaluation needs, before a model is loaded.

    Args:
        name: one of `TASKS`.
        data: files in the task's format; each is scored separately.
        annotations: VQAv2's answers, beside one file of questions.
        images: the images' folder; default: each file's own.
        language: the value of `{lang}` in prompts, and the language of captions.
        prompt: a template of the questions' fields and `{lang}`; default: the task's.
        limit: take only the first `limit` questions of each file.

    Raises:
        OSError, ValueError: naming the file, the place in it, and the fault; a bad template or limit.
        RuntimeError: a package that the metrics need is not installed.
    """
    task = TASKS[name]
    for package in task.packages:
        if find_spec(package) is None:
            raise RuntimeError(f"{name} needs the package `{package}`: install this package's `evaluate` extra")
    if annotations is not None and (name != "vqa" or len(data) != 1):
        raise ValueError("--annotations: goes with --task vqa and one file of questions")
    if limit is not None and (limit < 1 or limit % task.group):
        allowed = "at least 1" if task.group == 1 else f"a multiple of {task.group}"
        raise ValueError(f"--limit: expected {allowed} for {name}, got {limit}")
    names = [path.name for path in data] if len({path.name for path in data}) == len(data) else list(map(str, data))
    if len(set(names)) != len(names):
        raise ValueError(f"--data: a file is given twice: {', '.join(names)}")
    subsets = {}
    for file, path in zip(names, data, strict=True):
        if not path.is_file():
            raise FileNotFoundError(f"--data {path}: no such file")
        questions = task.read(Source(path, annotations, language))[:limit]
        subsets[file] = find_images(questions, images or path.parent)
    template = task.prompt if prompt is None else prompt
    _check_template(template, next(iter(subsets.values()))[0])
    return Evaluation(name, template, language, subsets)


def _check_template(template: str, question: Question) -> None:
    allowed = [*question.fields, "lang"]
    try:
        used = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"--prompt {template!r}: {error}") from error
    if surrogate := lone_surrogate(template):
        raise ValueError(
            f"--prompt {template!r}: it holds {surrogate}, half of a surrogate pair, which is no character"
        )
    for name in used:
        if name not in allowed:
            raise ValueError(f"--prompt {template!r}: {{{name}}} is none of {', '.join(f'{{{a}}}' for a in allowed)}")


class Predictions:
    """A file of JSON lines: first the settings that it was made with, then one line for each question in order.

    Opening an existing file continues after its last whole batch, so that it will hold the same answers as without interruption.
    Nothing is written before the first answers. Raises ValueError for another kind of file or other settings, OSError for a file
    that cannot be read or written.
    """

    def __init__(self, path: Path, evaluation: Evaluation, made_with: Mapping[str, object], batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"--batch-size: expected at least 1, got {batch_size}")
        self.path, self._evaluation = path, evaluation
        self._asked = [(file, question) for file, questions in evaluation.subsets.items() for question in questions]
        origin = {"task": evaluation.name, "prompt": evaluation.template, **made_with, "questions": evaluation.digest()}
        self._start = json.dumps({"evaluation": origin}, ensure_ascii=False).encode() + b"\n"
        self.answers: list[Answer] = []
        content = path.read_bytes() if path.exists() else b""
        if content:
            header, *lines = content.split(b"\n")[:-1] or [content]
            self._check_origin(header, origin)
            if len(lines) < len(self._asked):
                lines = lines[: len(lines) // batch_size * batch_size]
            self.answers = [self._parse(line, i) for i, line in enumerate(lines)]
            self._start = b"".join(line + b"\n" for line in (header, *lines))
        elif not os.access(path.absolute().parent, os.W_OK):
            raise OSError(f"--output {path}: cannot be written; it must be a file in an existing, writable folder")

    def append(self, answers: Sequence[Answer]) -> None:
        """Append the next questions' answers."""
        lines = [self._line(len(self.answers) + i, answer) for i, answer in enumerate(answers)]
        if self._start:
            write_atomically(self.path, self._start)
            self._start = b""
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(f"{line}\n" for line in lines))
        self.answers += answers

    def _check_origin(self, header: bytes, expected: Mapping[str, object]) -> None:
        try:
            given = parse_json(header)["evaluation"]
            differing = [name for name, value in expected.items() if given.get(name) != value]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--output {self.path}: it exists and holds no predictions; it is left as it is"
            ) from error
        if differing:
            name = differing[0]
            what = "other questions" if name == "questions" else f"{name} {given.get(name)!r}, not {expected[name]!r}"
            raise ValueError(f"--output {self.path}: it was made with {what}; give another file or delete this one")

    def _parse(self, line: bytes, index: int) -> Answer:
        try:
            content = parse_json(line)
            wanted = self._asked[index][1].id
            if content["id"] != wanted or not isinstance(content["prediction"], str):
                raise ValueError(f"expected the answer to question {wanted!r}")
            probabilities = content.get("location_probabilities")
            if probabilities is not None and not all(type(p) in (int, float) and 0 <= p <= 1 for p in probabilities):
                raise ValueError("location_probabilities: expected numbers from 0 to 1")
            return Answer(content["prediction"], None if probabilities is None else tuple(probabilities))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"--output {self.path}, line {index + 2}: it holds no prediction ({error})") from error

    def _line(self, index: int, answer: Answer) -> str:
        file, question = self._asked[index]
        content: dict[str, Any] = {
            "id": question.id,
            "file": file,
            "images": list(map(str, question.images)),
            "prompt": self._evaluation.prompt(question),
            "prediction": answer.text,
        }
        if isinstance(question.reference, (str, tuple)):
            content["references"] = question.reference
        if answer.location_probabilities is not None:
            content["location_probabilities"] = answer.location_probabilities
        return json.dumps(content, ensure_ascii=False)


def ask(
    evaluation: Evaluation,
    model: PaliGemma,
    processor: Processor,
    *,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    predictions: Predictions | None = None,
) -> list[Answer]:
    """Let a model answer the questions without an answer in `predictions`, greedily or by beams. Return all answers.

    `max_new_tokens` None takes the task's number, or the number of the model's positions.

    Raises ValueError if masks are scored and the processor has no mask decoder, and what processor and `generate` raise.
    """
    if evaluation.needs_masks and processor.mask_decoder is None:
        raise ValueError(f"{evaluation.name} compares masks: give the mask decoder's weights with --mask-decoder")
    if batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {batch_size}")
    questions = evaluation.questions
    answers = [] if predictions is None else list(predictions.answers)
    starts = range(len(answers), len(questions), batch_size)
    bar = tqdm(total=len(questions), initial=len(answers), desc=evaluation.name, unit="question", disable=None)
    with bar, ThreadPoolExecutor(1) as loader:  # images are read while the model answers
        inputs = [loader.submit(_inputs, evaluation, processor, questions[i : i + batch_size]) for i in starts[:1]]
        for i in starts:
            batch = inputs.pop().result()
            if i + batch_size < len(questions):
                following = questions[i + batch_size : i + 2 * batch_size]
                inputs.append(loader.submit(_inputs, evaluation, processor, following))
            given = _answer(evaluation.task, model, processor, batch, max_new_tokens, num_beams)
            if predictions is not None:
                predictions.append(given)
            answers += given
            bar.update(len(given))
    return answers


def last_written(checkpoint: Path) -> int:
    """Return when a checkpoint's weights were written, in nanoseconds. It tells a model that was trained further in place."""
    files = [checkpoint] if checkpoint.is_file() else checkpoint.glob("*.safetensors")
    return max((file.stat().st_mtime_ns for file in files), default=0)


def _inputs(evaluation: Evaluation, processor: Processor, batch: Sequence[Question]) -> Inputs:
    """Make a batch for the model with each distinct image once. `image_index` holds the image of each placeholder."""
    paths = [path for question in batch for path in question.images]
    once = list(dict.fromkeys(paths))
    loaded = {path: load_image(path) for path in once}
    prompts = [evaluation.prompt(question) for question in batch]
    try:
        inputs = processor([[loaded[path] for path in question.images] for question in batch], prompts)
    except ValueError as error:
        files, ids = ", ".join(evaluation.subsets), ", ".join(question.id for question in batch)
        raise ValueError(f"{files}: of the questions {ids}, {error}") from error
    inputs["pixel_values"] = inputs["pixel_values"][[paths.index(path) for path in once]]
    inputs["image_index"] = torch.tensor([once.index(path) for path in paths])
    return inputs


@torch.inference_mode()
def _answer(
    task: Task,
    model: PaliGemma,
    processor: Processor,
    inputs: Inputs,
    max_new_tokens: int | None,
    num_beams: int,
) -> list[Answer]:
    device = next(model.parameters()).device
    inputs = inputs.to(device)
    features = model.get_image_features(inputs.pop("pixel_values"))[inputs.pop("image_index")]
    if max_new_tokens is None:
        room = model.config.text_config.max_position_embeddings - inputs["input_ids"].shape[1]
        max_new_tokens = min(task.max_new_tokens, max(room, 1))
    output = model.generate(
        **inputs, image_features=features, max_new_tokens=max_new_tokens, num_beams=num_beams, return_scores=True
    )
    texts = processor.decode(output.ids)
    if not task.finds:
        return [Answer(text) for text in texts]
    is_location = torch.isin(output.ids, torch.tensor(sorted(processor.location_ids), device=device))
    return [
        Answer(text, tuple(round(p, 6) for p in scores[chosen].exp().tolist()))
        for text, scores, chosen in zip(texts, output.scores, is_location, strict=True)
    ]


def table(scores: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]) -> Iterator[str]:
    """Return the scores as lines of text, times 100 as in papers: a line for each file, or for each score of a single file."""
    if len(scores) == 1:
        ((file, only),) = scores.items()
        width = max(map(len, only))
        for name, value in only.items():
            yield f"{name:{width}}  {100 * value:7.2f}"
        yield f"{'questions':{width}}  {counts[file]:7}"
        return
    names = list(dict.fromkeys(name for each in scores.values() for name in each))
    first = max(map(len, scores))
    yield " " * first + "".join(f"  {name:>9}" for name in [*names, "questions"])
    for file, each in scores.items():
        cells = [f"{100 * each[name]:.2f}" if name in each else "" for name in names]
        cells.append(str(counts.get(file, "")))
        row = "".join(f"  {cell:>{max(len(name), 9)}}" for cell, name in zip(cells, [*names, "questions"]))
        yield f"{file:{first}}{row}".rstrip()
