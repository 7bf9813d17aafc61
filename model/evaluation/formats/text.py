"""Files of captions, questions and multiple choices, whose answers are text."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from itertools import permutations
from pathlib import Path

from ...added_tokens import lone_surrogate
from ...files import read_json_object, unreadable
from .entries import (
    Entry,
    coco_image_names,
    known_id,
    read_json_lines,
    read_list,
    read_object,
    require_questions,
    shown,
)
from .questions import Options, Question, Read

_MOST_PERMUTED = 6


def read_captions(path: Path, language: str) -> Read:
    """Read COCO's captions JSON, or the captions in `language` from JSON lines of XM3600 or COCO-35L."""
    if path.suffix == ".jsonl":
        return _read_caption_lines(path, language)
    top = read_object(path)
    images = {entry.number("id"): entry for entry in top.entries("images")}
    captions: dict[int, list[str]] = defaultdict(list)
    for entry in top.entries("annotations"):
        captions[known_id(entry, "image_id", images)].append(entry.texts("caption")[0])
    return [
        (Question(str(number), (), {}, tuple(captions[number])), [coco_image_names(images[number], number)])
        for number in images
        if number in captions
    ]


def _read_caption_lines(path: Path, language: str) -> Read:
    captions: dict[str, list[str]] = defaultdict(list)
    names: dict[str, list[str]] = {}
    for entry in read_json_lines(path):
        if "image/key" in entry.content:  # XM3600: every language in one line
            image = entry.text("image/key")
            names[image] = [f"{image}.jpg"]
            if language in entry.content:
                captions[image] += Entry(entry.content[language], f"{entry.where}: {language}").texts("caption")
            continue
        # COCO-35L: a line for each caption and language into which it was translated from English.
        image = entry.text("image_id").partition("_")[0]
        if not image.isdecimal():
            raise entry.error("image_id", "COCO's number of an image")
        names[image] = [f"COCO_val2014_{int(image):012d}.jpg", f"COCO_train2014_{int(image):012d}.jpg"]
        names[image] += [f"{int(image):012d}.jpg"]
        target = entry.text("trg_lang")
        if target == language:
            captions[image].append(entry.texts("translation_tokenized")[0])
        elif language == "en" and target == "de":  # each English caption once
            captions[image].append(entry.texts("caption_tokenized")[0])
    if not captions:
        raise ValueError(f"{path}: it holds no captions in the language {language!r}")
    return [(Question(image, (), {}, tuple(texts)), [names[image]]) for image, texts in captions.items()]


def read_vqa(path: Path, annotations: Path | None) -> Read:
    """Read the questions of VQAv2 or OK-VQA with the answers of the annotations file, or TextVQA's JSON, which has both."""
    top = read_object(path)
    if "questions" not in top.content:
        if annotations is not None:
            raise ValueError(f"--annotations: {path} has no 'questions', so that none are needed beside it")
        return [
            (
                Question(entry.text("question_id"), (), {"question": entry.text("question")}, entry.texts("answers")),
                [[f"{entry.text('image_id')}.jpg"]],
            )
            for entry in top.entries("data")
        ]
    if annotations is None:
        raise ValueError(f"{path} holds questions without answers: give VQAv2's file of them with --annotations")
    answers = {}
    for entry in read_object(annotations).entries("annotations"):
        people = tuple(answer.texts("answer")[0] for answer in entry.entries("answers"))
        kind = entry.text("answer_type") if "answer_type" in entry.content else ""
        answers[entry.number("question_id")] = people, kind
    subset = top.content.get("data_subtype")
    questions: Read = []
    for entry in top.entries("questions"):
        number = entry.number("question_id")
        if number not in answers:
            raise ValueError(f"{entry.where}: {annotations} holds no answers to question {number}")
        people, kind = answers[number]
        question = Question(str(number), (), {"question": entry.text("question")}, people, kind)
        questions.append((question, [coco_image_names(entry, entry.number("image_id"), subset)]))
    return questions


def read_gqa(path: Path) -> Read:
    """Read GQA's questions JSON: an object for each question, by its id."""
    questions: Read = []
    for number, content in read_json_object(path).items():
        entry = Entry(content, f"{path}: {number}")
        if lone_surrogate(number):
            raise ValueError(f"{path}: {number!r}: expected a question's number")
        question = Question(number, (), {"question": entry.text("question")}, (entry.text("answer"),))
        questions.append((question, [[f"{entry.text('imageId')}.jpg"]]))
    return require_questions(questions, path)


def read_docvqa(path: Path) -> Read:
    """Read the JSON of DocVQA, InfographicVQA or ST-VQA: `data` with question, answers and the name of a page or image.

    Lists in InfographicVQA's answers may come in any order: each of up to 720 orders is accepted.
    """
    questions: Read = []
    for entry in read_object(path).entries("data"):
        if "answers" not in entry.content:
            raise ValueError(
                f"{entry.where}: 'answers' is missing; test sets without answers are scored by their server"
            )
        answers = entry.texts("answers")
        if "image_local_name" in entry.content:
            answers = tuple(order for answer in answers for order in _orders(answer))
        image = entry.text("image", "image_local_name", "file_path")
        question = Question(entry.text("questionId", "question_id"), (), {"question": entry.text("question")}, answers)
        questions.append((question, [[image, Path(image).name]]))
    return questions


def _orders(answer: str) -> list[str]:
    parts = answer.split(", ")
    return [", ".join(order) for order in permutations(parts)] if len(parts) <= _MOST_PERMUTED else [answer]


def read_chartqa(path: Path) -> Read:
    """Read ChartQA's JSON, human or augmented: a list of imgname, query and label."""
    return [
        (Question(str(i), (), {"question": entry.text("query")}, entry.texts("label")), [[entry.text("imgname")]])
        for i, entry in enumerate(read_list(path))
    ]


def read_lines(path: Path, prefix: str | None = None) -> Read:
    """Read JSON lines of image (or a list of images), prefix and suffix (or a list of accepted answers), as for fine-tuning.

    `prefix` is the default for lines without one; None makes it required.
    """
    questions: Read = []
    for i, entry in enumerate(read_json_lines(path), 1):
        asked = prefix if prefix is not None and "prefix" not in entry.content else entry.text("prefix")
        images = [[name] for name in entry.texts("image")]
        questions.append((Question(str(i), (), {"prefix": asked}, entry.texts("suffix")), images))
    return questions


def read_pope(path: Path) -> Read:
    """Read POPE's JSON lines: image, text (the question) and label (yes or no)."""
    questions: Read = []
    for i, entry in enumerate(read_json_lines(path), 1):
        label = entry.text("label").lower()
        if label not in ("yes", "no"):
            raise entry.error("label", "yes or no")
        number = entry.text("question_id") if "question_id" in entry.content else str(i)
        questions.append((Question(number, (), {"question": entry.text("text")}, label), [[entry.text("image")]]))
    return questions


def read_mmvp(path: Path) -> Read:
    """Read MMVP's Questions.csv, two rows for each pair. Images are named by the row's index."""
    columns = ("Index", "Question", "Options", "Correct Answer")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise unreadable(path, "CSV", error) from error
    questions: Read = []
    for line, row in enumerate(rows, 2):
        where = f"{path}, row {line}"
        if not all(row.get(column) for column in columns):
            raise ValueError(f"{where}: expected {', '.join(columns)}, got {shown(row)}")
        options = re.findall(r"\(([a-z])\)\s*([^()]+)", row["Options"])
        letters = [f"({letter})" for letter, _ in options]
        right = row["Correct Answer"].strip().lower()
        if right not in letters or letters != [f"({chr(ord('a') + i)})" for i in range(len(letters))]:
            raise ValueError(
                f"{where}: expected options '(a) … (b) …' with one of them right, got {row['Options']!r} and {right!r}"
            )
        texts = tuple(text.strip() for _, text in options)
        fields = {"question": row["Question"].strip(), "options": row["Options"].strip()}
        question = Question(row["Index"], (), fields, Options(texts, letters.index(right)))
        questions.append((question, [[f"{row['Index']}.jpg", f"MMVP Images/{row['Index']}.jpg"]]))
    if len(questions) % 2:
        raise ValueError(f"{path}: expected an even number of rows, two for each pair, got {len(questions)}")
    return require_questions(questions, path)
