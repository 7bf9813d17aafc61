"""`pg-kernels evaluate` on tiny files of every format, with tiny models that always give one answer."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_answer

from pg_kernels.model import EMBEDDED_CHECKPOINT, PaliGemma, PaliGemmaConfig, Processor, TextConfig, VisionConfig, cli
from pg_kernels.model.evaluation.catalogue import ABOUT
from pg_kernels.model.evaluation.formats.questions import decode_masks
from pg_kernels.model.evaluation.run import Evaluation, ask, prepare
from pg_kernels.model.evaluation.tasks import TASKS, Answer
from pg_kernels.model.tokenizer import Tokenizer

SIZE = (100, 50)
MASK_DECODER = Path(__file__).parents[1] / "fixtures" / "seg_vae.params.npz"
SEGMENT = "<loc0000><loc0001><loc1022><loc1023>" + "".join(f"<seg{code:03d}>" for code in range(0, 128, 8)) + " fox"
DETECT = "<loc0100><loc0200><loc0600><loc0700> fox"
# The same box in COCO's format, for an image of that size.
BOX = [200 / 1023 * 100, 100 / 1023 * 50, 500 / 1023 * 100, 500 / 1023 * 50]


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        assert self.code == 0, self.err
        return json.loads(self.out)["scores"]

    @property
    def error(self) -> str:
        """Return the one line that says why a command failed."""
        assert (self.code, self.out) == (1, ""), self.err
        (line,) = [line for line in self.err.splitlines() if "error" in line]
        return line.removeprefix("pg-kernels: error: ")


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Result:
        code = cli.main(["evaluate", *map(str, arguments)])
        return Result(code, *capsys.readouterr())

    return call


def build(answer: str | None, folder: Path) -> Path:
    """Write a tiny checkpoint: random, or one that always gives one answer because each token determines the next."""
    text = Tokenizer.from_pretrained(EMBEDDED_CHECKPOINT)
    config = PaliGemmaConfig(
        vision_config=VisionConfig(32, 48, 1, 2, image_size=28),
        text_config=TextConfig(
            vocab_size=len(text),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=128,
        ),
        image_token_id=text.image_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = PaliGemma(config)
    if answer is not None:
        make_answer(model, text, answer)
    model.save_pretrained(folder)
    vision = config.vision_config
    Processor(text, image_size=vision.image_size, num_image_tokens=vision.num_image_tokens).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """Return the checkpoint that gives an answer; the random one for None."""
    made: dict[str | None, Path] = {}

    def get(answer: str | None) -> Path:
        if answer not in made:
            made[answer] = build(answer, tmp_path_factory.mktemp("checkpoint"))
        return made[answer]

    return get


def write(path: Path, content: Any) -> Path:
    """Write JSON, JSON lines for a list, or text unchanged."""
    if path.suffix == ".jsonl" and not isinstance(content, str):
        content = "".join(json.dumps(line) + "\n" for line in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def picture(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "green").save(path)


def instances(*annotations: dict[str, Any]) -> dict[str, Any]:
    """Return COCO's JSON of two images (the second without `file_name`) and two categories."""
    return {
        "images": [
            {"id": 7, "file_name": "val2014/seven.jpg", "width": SIZE[0], "height": SIZE[1], "caption": "the fox"},
            {"id": 8, "width": SIZE[0], "height": SIZE[1], "caption": "the red fox"},
        ],
        "categories": [{"id": 3, "name": "Fox"}, {"id": 4, "name": "owl"}],
        "annotations": [{"id": i, "iscrowd": 0, **annotation} for i, annotation in enumerate(annotations)],
    }


IMAGES = ("seven.jpg", "COCO_val2014_000000000008.jpg")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    for name in IMAGES:
        picture(tmp_path / name)
    return tmp_path / "coco.json"


def asked(task: str, *data: Path, **options: Any) -> list[tuple[str, list[str], Any]]:
    """Return each question's prompt, image names and reference."""
    evaluation = prepare(task, data, **options)
    return [(evaluation.prompt(q), [path.name for path in q.images], q.reference) for q in evaluation.questions]


# Formats, and the scores of one answer to all questions


def test_coco_captions(run: Run, checkpoints: Callable[[str], Path], coco: Path) -> None:
    captions = [
        {"image_id": 8, "caption": "a red fox "},
        {"image_id": 7, "caption": "an owl"},
        {"image_id": 7, "caption": "a bird"},
    ]
    write(coco, instances(*captions))
    assert asked("caption", coco) == [
        ("caption en", ["seven.jpg"], ("an owl", "a bird")),
        ("caption en", ["COCO_val2014_000000000008.jpg"], ("a red fox ",)),
    ]
    done = run("--task", "caption", "--data", coco, "--checkpoint", checkpoints("a red fox"), "--json")
    # Correct for one of two images. No word, and no pair of words, of its caption occurs in the other's.
    assert done.scores == {"coco.json": {"cider": pytest.approx(10 * 3 / 4 / 2), "bleu4": pytest.approx(0, abs=0.05)}}


def test_captions_in_other_languages(tmp_path: Path) -> None:
    xm3600 = [
        {"image/key": "k1", "en": {"caption": ["a fox"]}, "de": {"caption": ["ein Fuchs", "Fuchs"]}},
        {"image/key": "k2", "en": {"caption": ["an owl"]}},
    ]
    for name in ("k1.jpg", "k2.jpg", "COCO_train2014_000000000009.jpg"):
        picture(tmp_path / name)
    path = write(tmp_path / "captions.jsonl", xm3600)
    assert asked("caption", path, language="de") == [("caption de", ["k1.jpg"], ("ein Fuchs", "Fuchs"))]
    line = {"image_id": "9_0", "caption_tokenized": "a fox", "translation_tokenized": "ein Fuchs", "trg_lang": "de"}
    path = write(tmp_path / "dev.jsonl", [line, line | {"translation_tokenized": "un renard", "trg_lang": "fr"}])
    image = ["COCO_train2014_000000000009.jpg"]
    assert asked("caption", path, language="fr") == [("caption fr", image, ("un renard",))]
    assert asked("caption", path) == [("caption en", image, ("a fox",))]
    with pytest.raises(ValueError, match=r"dev\.jsonl: it holds no captions in the language 'xx'"):
        prepare("caption", [path], language="xx")


def vqa_files(folder: Path) -> tuple[Path, Path]:
    questions = [
        {"question_id": 1, "image_id": 5, "question": "Is it red?"},
        {"question_id": 2, "image_id": 5, "question": "How many?"},
    ]
    answers = {1: ("yes/no", ["yes"] * 10), 2: ("number", ["2"] * 9 + [""])}
    annotations = [
        {"question_id": number, "answer_type": kind, "answers": [{"answer": text, "answer_id": 1} for text in texts]}
        for number, (kind, texts) in answers.items()
    ]
    picture(folder / "COCO_test2015_000000000005.jpg")
    return (
        write(folder / "questions.json", {"data_subtype": "test2015", "questions": questions}),
        write(folder / "annotations.json", {"annotations": annotations}),
    )


def test_vqav2(run: Run, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    questions, annotations = vqa_files(tmp_path)
    assert asked("vqa", questions, annotations=annotations)[1] == (
        "answer en How many?",
        ["COCO_test2015_000000000005.jpg"],
        ("2",) * 9 + ("",),
    )
    arguments = ("--task", "vqa", "--data", questions, "--annotations", annotations)
    done = run(*arguments, "--checkpoint", checkpoints("yes"), "--json")
    assert done.scores == {"questions.json": {"accuracy": 0.5, "accuracy number": 0.0, "accuracy yes/no": 1.0}}
    done = run(*arguments, "--checkpoint", checkpoints("yes"))
    assert done.out.splitlines() == [
        "accuracy           50.00",
        "accuracy number     0.00",
        "accuracy yes/no   100.00",
        "questions              2",
    ]


def test_textvqa_and_gqa(tmp_path: Path) -> None:
    picture(tmp_path / "train_images" / "0f.jpg")
    data = [{"question_id": 3, "image_id": "0f", "question": "what brand?", "answers": ["nokia"] * 9 + ["toshiba"]}]
    path = write(tmp_path / "textvqa.json", {"data": data})
    assert asked("vqa", path, images=tmp_path / "train_images") == [
        ("answer en what brand?", ["0f.jpg"], ("nokia",) * 9 + ("toshiba",))
    ]
    path = write(tmp_path / "gqa.json", {"0123": {"question": "Is it?", "imageId": "0f", "answer": "no", "other": 1}})
    assert asked("gqa", path, images=tmp_path / "train_images") == [("answer en Is it?", ["0f.jpg"], ("no",))]


@pytest.mark.parametrize(
    ("task", "entry", "image", "answers"),
    [
        (
            "docvqa",
            {"questionId": 1, "image": "documents/a_1.png", "answers": ["ITC", "itc"]},
            "a_1.png",
            ("ITC", "itc"),
        ),
        ("infovqa", {"questionId": 1, "image_local_name": "2.png", "answers": ["a, b"]}, "2.png", ("a, b", "b, a")),
        ("stvqa", {"question_id": 1, "file_path": "coco-text/c.jpg", "answers": ["x"]}, "c.jpg", ("x",)),
    ],
)
def test_documents(
    run: Run,
    checkpoints: Callable[[str], Path],
    tmp_path: Path,
    task: str,
    entry: dict[str, Any],
    image: str,
    answers: tuple[str, ...],
) -> None:
    picture(tmp_path / image)
    path = write(tmp_path / "val.json", {"data": [{"question": "which?", **entry}]})
    assert asked(task, path) == [("answer en which?", [image], answers)]
    done = run("--task", task, "--data", path, "--checkpoint", checkpoints("yes"), "--json")
    assert done.scores == {"val.json": {"anls": 0.0, "exact_match": 0.0}}


def test_chartqa_in_two_files(run: Run, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    picture(tmp_path / "c.png")
    entry = {"imgname": "c.png", "query": "how much?"}
    human = write(tmp_path / "human.json", [{**entry, "label": "20"}])
    augmented = write(tmp_path / "augmented.json", [{**entry, "label": "21"}, {**entry, "label": "40"}])
    assert asked("chartqa", human) == [("answer en how much?", ["c.png"], ("20",))]
    arguments = ("--task", "chartqa", "--data", human, augmented, "--checkpoint", checkpoints("20"))
    done = run(*arguments, "--json")
    assert done.scores == {
        "human.json": {"relaxed_accuracy": 1.0, "exact_match": 1.0},
        "augmented.json": {"relaxed_accuracy": 0.5, "exact_match": 0.0},
        "mean": {"relaxed_accuracy": 0.75, "exact_match": 0.5},
    }
    assert run(*arguments).out.splitlines() == [
        "                relaxed_accuracy  exact_match  questions",
        "human.json                100.00       100.00          1",
        "augmented.json             50.00         0.00          2",
        "mean                       75.00        50.00",
    ]


def test_json_lines(run: Run, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    lines = [
        {"image": "a.png", "prefix": "what is it?", "suffix": "fox"},
        {"image": ["a.png", "b.png"], "prefix": "and these?", "suffix": ["foxes", "two foxes"]},
    ]
    path = write(tmp_path / "lines.jsonl", lines)
    assert asked("jsonl", path) == [
        ("what is it?", ["a.png"], ("fox",)),
        ("and these?", ["a.png", "b.png"], ("foxes", "two foxes")),
    ]
    done = run("--task", "jsonl", "--data", path, "--checkpoint", checkpoints("fox"), "--json")
    assert done.scores == {"lines.jsonl": {"exact_match": 0.5}}
    path = write(tmp_path / "texts.jsonl", [{"image": "a.png", "suffix": "fix"}, lines[0] | {"suffix": "fox"}])
    assert [prompt for prompt, _, _ in asked("ocr", path)] == ["ocr", "what is it?"]
    done = run("--task", "ocr", "--data", path, "--checkpoint", checkpoints("fox"), "--json")
    assert done.scores == {"texts.jsonl": {"exact_match": 0.5, "character_error_rate": pytest.approx(1 / 6)}}


def test_a_prompt_that_is_too_long(run: Run, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = write(tmp_path / "lines.jsonl", [{"image": "a.png", "prefix": "what? " * 100, "suffix": "fox"}])
    error = run("--task", "jsonl", "--data", path, "--checkpoint", checkpoints("fox")).error
    assert re.match(r"lines\.jsonl: of the questions 1, prompts\[0\]: .* the model takes at most 128", error)


def test_pope(run: Run, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    picture(tmp_path / "p.jpg")
    lines = [
        {"question_id": i, "image": "p.jpg", "text": f"Is there a {i}?", "label": label}
        for i, label in enumerate(["yes", "no", "no", "no"])
    ]
    path = write(tmp_path / "pope.json", "".join(json.dumps(line) + "\n" for line in lines))
    done = run("--task", "pope", "--data", path, "--checkpoint", checkpoints("yes"), "--json")
    assert done.scores == {
        "pope.json": {"accuracy": 0.25, "precision": 0.25, "recall": 1.0, "f1": 0.4, "yes_ratio": 1.0, "valid": 1.0}
    }


MMVP = "Index,Question,Options,Correct Answer\n1,Which?,(a) Fox (b) Owl,(a)\n2,Which?,(a) Fox (b) Owl,(b)\n"


def test_mmvp(run: Run, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    rows = MMVP + "3,One?,(a) fox (b) owl,(a)\n4,One?,(a) owl (b) fox,(b)\n"
    for i in range(1, 5):
        picture(tmp_path / "MMVP Images" / f"{i}.jpg")
    path = write(tmp_path / "Questions.csv", "\ufeff" + rows)
    assert asked("mmvp", path, prompt="answer {lang} {question} {options}")[0][0] == "answer en Which? (a) Fox (b) Owl"
    done = run("--task", "mmvp", "--data", path, "--checkpoint", checkpoints("fox"), "--json")
    assert done.scores == {"Questions.csv": {"pair_accuracy": 0.5, "accuracy": 0.75}}
    assert (
        "--limit: expected a multiple of 2 for mmvp, got 3" in run("--task", "mmvp", "--data", path, "--limit", 3).error
    )


def test_detection(run: Run, checkpoints: Callable[[str], Path], coco: Path, tmp_path: Path) -> None:
    owl = {"image_id": 8, "category_id": 4, "bbox": [0, 0, 10, 10]}
    write(coco, instances({"image_id": 8, "category_id": 3, "bbox": BOX}, owl, {**owl, "iscrowd": 1}))
    ((prompt, images, reference),) = asked("detect", coco)
    assert (prompt, images, reference.crowds) == ("detect fox ; owl", list(IMAGES[1:]), (False, False, True))
    assert reference.objects[0].box == pytest.approx((BOX[0], BOX[1], BOX[0] + BOX[2], BOX[1] + BOX[3]))
    output = tmp_path / "predictions.jsonl"
    arguments = ("--task", "detect", "--data", coco, "--checkpoint", checkpoints(DETECT), "--json", "--output", output)
    done = run(*arguments)
    assert done.scores == {"coco.json": {name: pytest.approx(0.5) for name in ("ap", "ap50", "ap75")}}
    _, line = map(json.loads, output.read_text().splitlines())
    assert len(line["location_probabilities"]) == 4 and all(0.1 < p <= 1 for p in line["location_probabilities"])
    assert run(*arguments).scores == done.scores


def test_the_surer_of_two_boxes_counts_first(coco: Path, checkpoints: Callable[[str], Path]) -> None:
    write(coco, instances({"image_id": 7, "category_id": 3, "bbox": BOX}))
    evaluation, processor = prepare("detect", [coco]), Processor.from_pretrained(checkpoints(None))
    # The first answer is malformed. Its five probabilities belong to no box.
    text = f"<loc0001><loc0002><loc0003><loc0004><loc0005> fox ; <loc0000><loc0000><loc0050><loc0050> fox ; {DETECT}"
    for probabilities, ap in (((0.9,) * 5 + (0.4,) * 4 + (0.6,) * 4, 1.0), ((0.9,) * 5 + (0.6,) * 4 + (0.4,) * 4, 0.5)):
        for separated in (text, text.replace(" ; ", "\n"), f"detect fox\n{text.replace(' ; ', ', ')}"):
            answer = Answer(separated, probabilities)
            assert evaluation.score([answer], processor)["coco.json"]["ap50"] == pytest.approx(ap)


def test_referring_expressions(run: Run, checkpoints: Callable[[str], Path], coco: Path) -> None:
    whole = {"bbox": [0, 0, *SIZE], "segmentation": [[0, 0, SIZE[0], 0, *SIZE, 0, SIZE[1]]]}
    corner = {"bbox": [0, 0, 10, 10], "segmentation": {"size": [50, 100], "counts": "0:nk4"}}
    write(coco, instances({"image_id": 7, **whole}, {"image_id": 8, **corner}))
    assert [prompt for prompt, _, _ in asked("refer", coco)] == ["segment the fox", "segment the red fox"]
    arguments = ("--task", "refer", "--data", coco, "--checkpoint", checkpoints(SEGMENT), "--json")
    scores = run(*arguments, "--mask-decoder", MASK_DECODER).scores["coco.json"]
    assert scores["precision@0.5"] == 0.5 and scores["missing"] == 0.0
    assert 0 < scores["mean_iou"] < 0.6  # the decoder turns those codes into a mask of a part of the image
    assert run(*arguments).error == "refer compares masks: give the mask decoder's weights with --mask-decoder"

    boxes = ({"image_id": 7, "bbox": BOX}, {"image_id": 8, "bbox": [0, 0, 10, 10]})
    write(coco, instances(*boxes))
    assert [prompt for prompt, _, _ in asked("refer", coco)] == ["detect the fox", "detect the red fox"]
    done = run("--task", "refer", "--data", coco, "--checkpoint", checkpoints(DETECT), "--json")
    assert done.scores == {"coco.json": {"precision@0.5": 0.5}}


def test_segmentation(run: Run, checkpoints: Callable[[str], Path], coco: Path) -> None:
    left, right = ([[x, 0, x + 50, 0, x + 50, 50, x, 50]] for x in (0, 50))
    fox, owl = ({"image_id": 7, "category_id": number} for number in (3, 4))
    crowd = {**owl, "segmentation": {"size": [50, 100], "counts": [2500, 2500]}, "iscrowd": 1}
    parts = [{**fox, "segmentation": left}, {**fox, "segmentation": right}, {**owl, "segmentation": left}, crowd]
    write(coco, instances(*parts))
    evaluation = prepare("segment", [coco])
    assert [evaluation.prompt(q) for q in evaluation.questions] == ["segment fox", "segment owl"]
    processor = Processor.from_pretrained(checkpoints(None), mask_decoder=MASK_DECODER)
    (thing,) = processor.parse(SEGMENT, SIZE)
    assert thing.mask is not None and thing.mask[:, :50].any()
    scores = evaluation.score([Answer(SEGMENT), Answer(SEGMENT)], processor)["coco.json"]
    # The fox counts everywhere. No owl right of the middle counts.
    of_fox, of_owl = thing.mask.mean(), thing.mask[:, :50].mean()
    expected = {"mean_iou": (of_fox + of_owl) / 2, "mean_iou of categories": (of_fox + of_owl) / 2, "missing": 0.0}
    assert scores == pytest.approx(expected)
    scores = evaluation.score([Answer(SEGMENT), Answer("")], processor)["coco.json"]
    assert scores["mean_iou"] == pytest.approx(of_fox / 2) and scores["missing"] == 0.5
    arguments = ("--task", "segment", "--data", coco, "--checkpoint", checkpoints(SEGMENT), "--json")
    done = run(*arguments, "--mask-decoder", MASK_DECODER)
    assert done.scores["coco.json"] == pytest.approx(expected)


def test_compressed_run_lengths(coco: Path) -> None:
    from pycocotools import mask as codec

    rng = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5, 0.99, 1.0):
        pixels = rng.random((SIZE[1], SIZE[0])) < share
        encoded = codec.encode(np.asfortranarray(pixels, np.uint8))
        segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
        write(coco, instances({"image_id": 7, "category_id": 3, "segmentation": segmentation}))
        ((_, _, region),) = asked("segment", coco)
        assert np.array_equal(decode_masks(region.masks, region.size), pixels)


@pytest.mark.parametrize("task", ["detect", "segment", "refer"])
def test_entries_of_the_stored_pixels_of_a_turned_photo(run: Run, coco: Path, tmp_path: Path, task: str) -> None:
    """EXIF rotates the picture, so boxes measured in the file's rows and columns do not fit it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", SIZE, "green").save(tmp_path / "seven.jpg", exif=exif)
    annotation = {"image_id": 7, "category_id": 3, "bbox": BOX, "segmentation": [[60, 0, 90, 0, 90, 40]]}
    content = instances(annotation)

    def error() -> str:
        write(coco, content)
        return run("--task", task, "--data", coco, "--checkpoint", tmp_path / "missing").error

    entry = f"{coco}: images[0]: width and height are 100 and 50"
    assert error() == f"{entry}, but {tmp_path / 'seven.jpg'} is of 50×100 pixels; its EXIF orientation turns it"
    content["images"][0].update(width=50, height=100)
    if task == "segment":
        assert "annotations[0]: 'segmentation': expected polygons [x1, y1, x2, y2, x3, y3, …] within 50×100" in error()
        content["annotations"][0]["segmentation"] = {"size": [50, 100], "counts": [2500, 2500]}
        assert "annotations[0]: 'segmentation': expected run lengths of size [100, 50], as its image is" in error()
        content["annotations"][0]["segmentation"] = {"size": [100, 50], "counts": [2500, 2500]}
    else:
        content["annotations"][0]["bbox"] = [60, 0, 30, 40]
        assert "annotations[0]: 'bbox': expected [x, y, width, height] within 50×100 pixels, got [60, " in error()
        content["annotations"][0].update(bbox=[0, 60, 50.4, 40], segmentation=[[0, 60, 50.4, 60, 50, 100]])
    assert error().startswith(f"{tmp_path / 'missing'} does not exist")  # everything is valid but the checkpoint
    content["images"][0].update(width=49)
    assert error().endswith("is of 50×100 pixels") or "'segmentation'" in error()
    (tmp_path / "seven.jpg").write_bytes(b"no picture")
    content["images"][0].update(width=50)
    assert error() == f"{tmp_path / 'seven.jpg'}: not an image, or of a format Pillow cannot read"


# Answering


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Write eleven questions about three pictures."""
    for i in range(3):
        Image.effect_noise(SIZE, 100).convert("RGB").save(tmp_path / f"{i}.png")
    questions = [{"image": f"{i % 3}.png", "prefix": f"what {'is ' * i}{i}", "suffix": "x"} for i in range(11)]
    return write(tmp_path / "lines.jsonl", questions)


def load(checkpoint: Path) -> tuple[PaliGemma, Processor]:
    return PaliGemma.from_pretrained(checkpoint), Processor.from_pretrained(checkpoint)


def test_answers_are_those_to_each_question_alone(lines: Path, checkpoints: Callable[[None], Path]) -> None:
    """In a batch, each picture is encoded once."""
    evaluation = prepare("jsonl", [lines])
    model, processor = load(checkpoints(None))
    encoded = []
    get_image_features = model.get_image_features
    model.get_image_features = lambda pixels: encoded.append(len(pixels)) or get_image_features(pixels)  # type: ignore
    answers = ask(evaluation, model, processor, batch_size=4, max_new_tokens=6)
    assert encoded == [3, 3, 3]
    assert len({answer.text for answer in answers}) > 3
    for question, answer in zip(evaluation.questions, answers, strict=True):
        inputs = processor(question.images[0], evaluation.prompt(question))
        assert processor.decode(model.generate(**inputs, max_new_tokens=6)) == [answer.text]


def test_location_probabilities(coco: Path, checkpoints: Callable[[str], Path]) -> None:
    """Probabilities equal those of the model's own next tokens, prompt by prompt, in a padded batch."""
    boxes = ({"image_id": 7, "category_id": 3, "bbox": BOX}, {"image_id": 8, "category_id": 4, "bbox": BOX})
    write(coco, instances(*boxes, {"image_id": 8, "category_id": 3, "bbox": BOX}))
    evaluation = prepare("detect", [coco])
    model, processor = load(checkpoints(DETECT))
    with torch.no_grad():
        model.lm_head.weight *= 0.3  # less certain
    answers = ask(evaluation, model, processor, batch_size=2)
    for question, answer in zip(evaluation.questions, answers, strict=True):
        assert answer.text == DETECT
        inputs = processor(question.images[0], evaluation.prompt(question), DETECT)
        with torch.no_grad():
            logits = model(inputs["input_ids"], inputs["pixel_values"], token_type_ids=inputs["token_type_ids"]).logits
        probabilities = logits[0].softmax(-1)
        start = int((inputs["token_type_ids"] == 0).sum())
        expected = [float(probabilities[start + i - 1, inputs["input_ids"][0, start + i]]) for i in range(4)]
        assert answer.location_probabilities == pytest.approx(expected, abs=1e-4)
        assert max(expected) < 0.99


def test_a_killed_evaluation_goes_on_to_the_same_file(
    run: Run, lines: Path, checkpoints: Callable[[None], Path], tmp_path: Path
) -> None:
    arguments = ["--task", "jsonl", "--data", lines, "--checkpoint", checkpoints(None), "--max-new-tokens", 6]
    arguments += ["--batch-size", 2, "--json"]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    done = run(*arguments, "--output", whole)
    assert done.scores == {"lines.jsonl": {"exact_match": 0.0}}
    assert len(whole.read_bytes().splitlines()) == 12

    slow = "import time, torch; from pg_kernels.model import PaliGemma, cli; generate = PaliGemma.generate\n"
    slow += "PaliGemma.generate = lambda *a, **k: (time.sleep(0.5), generate(*a, **k))[1]; cli.main()"
    command = [sys.executable, "-c", slow, "evaluate", *map(str, arguments), "--output", str(cut)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (cut.exists() and cut.read_bytes().count(b"\n") > 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 4 < cut.read_bytes().count(b"\n") < 12
    with cut.open("ab") as file:  # one line of the next batch and a part of another
        file.write(whole.read_bytes().splitlines(keepends=True)[cut.read_bytes().count(b"\n")] + b'{"id": ')
    assert run(*arguments, "--output", cut).scores == done.scores
    assert cut.read_bytes() == whole.read_bytes()


def test_a_finished_file_is_only_scored(
    run: Run, lines: Path, checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "predictions.jsonl"
    arguments = ("--task", "jsonl", "--data", lines, "--checkpoint", checkpoints("fox"), "--output", output)
    assert run(*arguments).code == 0
    before = output.read_bytes()
    monkeypatch.setattr(PaliGemma, "generate", None)
    write(lines, [json.loads(line) | {"suffix": "fox"} for line in lines.read_text().splitlines()])
    assert run(*arguments, "--json").scores == {"lines.jsonl": {"exact_match": 1.0}}  # improved references
    assert output.read_bytes() == before


def test_files_of_other_predictions_are_refused(
    run: Run, lines: Path, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    output, checkpoint = tmp_path / "predictions.jsonl", tmp_path / "checkpoint"
    shutil.copytree(checkpoints("fox"), checkpoint)
    given: dict[str, object] = {"--task": "jsonl", "--data": lines, "--checkpoint": checkpoint, "--output": output}

    def call(**changed: object) -> Result:
        options = given | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
        return run(*(word for option in options.items() for word in option))

    assert call().code == 0
    before = output.read_bytes()
    other = checkpoints("yes")
    for changed, message in [
        ({"checkpoint": other}, f"checkpoint '{checkpoint}', not '{other}'"),
        ({"task": "ocr"}, "task 'jsonl', not 'ocr'"),
        ({"prompt": "{prefix}?"}, "prompt '{prefix}', not '{prefix}?'"),
        ({"quantize": "int8"}, "quantize None, not 'int8'"),
        ({"max_new_tokens": 3}, "max_new_tokens None, not 3"),
        ({"limit": 3}, "other questions"),
    ]:
        message = f"--output {output}: it was made with {message}; give another file or delete this one"
        assert call(**changed).error == message
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    assert "it was made with checkpoint_written " in call().error
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"precious", "it exists and holds no predictions; it is left as it is"),
        (b'{"image": "a.png"}\n', "it exists and holds no predictions; it is left as it is"),
        (b"[]\n[]\n", "it exists and holds no predictions; it is left as it is"),
    ],
)
def test_other_files_are_left_as_they_are(run: Run, lines: Path, tmp_path: Path, content: bytes, message: str) -> None:
    output = tmp_path / "notes.txt"
    output.write_bytes(content)
    done = run("--task", "jsonl", "--data", lines, "--checkpoint", tmp_path / "missing", "--output", output)
    assert done.error == f"--output {output}: {message}" and output.read_bytes() == content
    nowhere = tmp_path / "nowhere" / "p.jsonl"
    done = run("--task", "jsonl", "--data", lines, "--checkpoint", tmp_path / "missing", "--output", nowhere)
    assert done.error == f"--output {nowhere}: cannot be written; it must be a file in an existing, writable folder"


def test_damaged_predictions_are_named(
    run: Run, lines: Path, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "predictions.jsonl"
    arguments = ("--task", "jsonl", "--data", lines, "--checkpoint", checkpoints("fox"), "--output", output)
    assert run(*arguments).code == 0
    whole = output.read_bytes().splitlines(keepends=True)
    unsure = whole[3][:-2] + b', "location_probabilities": [0.5, "x"]}\n'
    others = (b"{}\n", b"[3]\n", b"[" * 100_000 + b"\n", unsure)
    for damaged in (*([*whole[:3], o, *whole[4:]] for o in others), [*whole[:3], whole[4], whole[3], *whole[5:]]):
        output.write_bytes(b"".join(damaged))
        assert run(*arguments).error.startswith(f"--output {output}, line 4: it holds no prediction (")
        assert output.read_bytes() == b"".join(damaged)


def test_nothing_is_written_when_the_model_cannot_be_loaded(run: Run, lines: Path, tmp_path: Path) -> None:
    output = tmp_path / "predictions.jsonl"
    done = run("--task", "jsonl", "--data", lines, "--checkpoint", tmp_path / "missing", "--output", output)
    assert done.error.startswith(f"{tmp_path / 'missing'} does not exist") and not output.exists()


# Bad files and options are refused before the (missing) model is read


POLYGON = [[0, 0, 10, 0, 10, 10]]


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("caption", "c.json", "{", r"c\.json cannot be read as a JSON object: "),
        ("caption", "c.json", "[]", r"c\.json cannot be read as a JSON object: it holds a list"),
        ("caption", "c.json", {}, r"c\.json: 'images' is missing; expected a list of objects that is not empty"),
        ("caption", "c.json", {"images": [3]}, r"c\.json: images\[0\]: expected an object, got 3"),
        (
            "caption",
            "c.json",
            instances(),
            r"c\.json: 'annotations': expected a list of objects that is not empty, got \[\]",
        ),
        (
            "caption",
            "c.json",
            instances({"image_id": 9}),
            r"annotations\[0\]: 'image_id': the file has none with the id 9",
        ),
        ("caption", "c.json", instances({"image_id": 7}), r"annotations\[0\]: 'caption' is missing; expected a text"),
        ("caption", "c.jsonl", [], r"c\.jsonl: it is empty"),
        (
            "caption",
            "c.jsonl",
            [{"image_id": "x_1"}],
            r"c\.jsonl, line 1: 'image_id': expected COCO's number of an image, g",
        ),
        ("vqa", "q.json", {"questions": [{}]}, r"q\.json holds questions without answers: give .* with --annotations"),
        (
            "vqa",
            "q.json",
            {"data": [{"question_id": 1}]},
            r"q\.json: data\[0\]: 'question' is missing; expected a text",
        ),
        ("gqa", "g.json", {}, r"g\.json: it holds no question"),
        ("gqa", "g.json", {"1": {"question": " "}}, r"g\.json: 1: 'question': expected a text, got ' '"),
        (
            "docvqa",
            "d.json",
            {"data": [{"question": "?"}]},
            r"d\.json: data\[0\]: 'answers' is missing; test sets without a",
        ),
        (
            "docvqa",
            "d.json",
            {"data": [{"answers": []}]},
            r"data\[0\]: 'answers': expected a text or a list of texts, got \[",
        ),
        ("chartqa", "h.json", {"a": 1}, r"h\.json: 'entries': expected a list"),
        ("chartqa", "h.json", "[", r"h\.json cannot be read as a JSON list: "),
        ("chartqa", "h.json", [{"query": "?"}], r"h\.json: entries\[0\]: 'label' is missing"),
        (
            "jsonl",
            "l.jsonl",
            '{"image": "x.png", "prefix": "a", "suffix": "b"}\n{',
            r"l\.jsonl cannot be .* lines: line 2: ",
        ),
        ("jsonl", "l.jsonl", [{"image": "x.png", "suffix": "b"}], r"l\.jsonl, line 1: 'prefix' is missing"),
        ("jsonl", "l.jsonl", "version https://git-lfs.github.com/spec/v1\n", r"it is a Git LFS pointer"),
        ("pope", "p.json", '{"label": "maybe"}', r"p\.json, line 1: 'label': expected yes or no, got 'maybe'"),
        (
            "mmvp",
            "m.csv",
            "Index,Question\n1,?\n",
            r"m\.csv, row 2: expected Index, Question, Options, Correct Answer, got ",
        ),
        (
            "mmvp",
            "m.csv",
            MMVP.replace("(b) Owl,(b)", "(c) Owl,(b)"),
            r"m\.csv, row 3: expected options '\(a\) … \(b\) …'",
        ),
        (
            "mmvp",
            "m.csv",
            MMVP[: MMVP.index("2,")],
            r"m\.csv: expected an even number of rows, two for each pair, got 1",
        ),
        ("mmvp", "m.csv", "Index\n", r"m\.csv: it holds no question"),
        (
            "detect",
            "d.json",
            {
                "images": [{"id": 7, "file_name": "a.png", "width": 10**400, "height": 9}],
                "categories": [{"id": 3, "name": "fox"}],
                "annotations": [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 1, 1]}],
            },
            r"d\.json: images\[0\]: width and height: expected at least 1 and below 2³¹, got 1000.*… and 9",
        ),
        ("caption", "c.json", "[" * 100_000, r"c\.json cannot be read as a JSON object: it is nested too deeply"),
        ("jsonl", "l.jsonl", "[" * 100_000, r"l\.jsonl cannot be read as JSON lines: line 1: it is nested too deeply"),
        (
            "jsonl",
            "l.jsonl",
            [{"image": "\ud800.png", "prefix": "a", "suffix": "b"}],
            r"line 1: 'image': expected a text",
        ),
        (
            "jsonl",
            "l.jsonl",
            [{"image": "x.png", "prefix": "\udc80", "suffix": "b"}],
            r"line 1: 'prefix': expected a text",
        ),
        (
            "jsonl",
            "l.jsonl",
            [{"image": "\0", "prefix": "a", "suffix": "b"}],
            r"no such image file; --images says where",
        ),
        (
            "jsonl",
            "l.jsonl",
            [{"image": "x" * 999, "prefix": "a", "suffix": "b"}],
            r"no such image file; --images says",
        ),
        (
            "gqa",
            "g.json",
            {"\ud800": {"question": "?", "imageId": "0", "answer": "a"}},
            r"g\.json: '.*': expected a quest",
        ),
        *(
            (
                "detect",
                "i.json",
                instances({"image_id": 7, "category_id": 3, "bbox": box}),
                r"'bbox': expected \[x, y, wid",
            )
            for box in ([0, 0, float("nan"), 5], [0, 0, float("inf"), 5], [0, 0, 10**400, 5], [0, 0, -1, 5], [True] * 4)
        ),
        *(
            (
                "segment",
                "i.json",
                instances({"image_id": 7, "category_id": 3, "segmentation": {"size": [50, 100], "counts": counts}}),
                r"'segmentation': expected run lengths of size",
            )
            for counts in ("é" * 9, "0" * 5000, "_" * 5000 + "0", "\ud800", " ", [2500, 2500.0], [2500, -1, 2501], None)
        ),
        ("detect", "i.json", instances({"image_id": 7, "category_id": 3}), r"annotations\[0\]: 'bbox' is missing; exp"),
        (
            "detect",
            "i.json",
            instances({"image_id": 7, "category_id": 9, "bbox": BOX}),
            r"'category_id': the file has none",
        ),
        (
            "segment",
            "i.json",
            instances({"image_id": 7, "category_id": 3}),
            r"'segmentation' is missing; expected polygons",
        ),
        (
            "segment",
            "i.json",
            instances({"image_id": 7, "category_id": 3, "segmentation": [[1e9, 0, 10, 0, 10, 10]]}),
            r"annotations\[0\]: 'segmentation': expected polygons",
        ),
        (
            "segment",
            "i.json",
            instances({"image_id": 7, "category_id": 3, "segmentation": {"size": [50, 100], "counts": [5, 5]}}),
            r"'segmentation': expected run lengths of size \[50, 100\], as its image is",
        ),
        (
            "segment",
            "i.json",
            instances({"image_id": 7, "category_id": 3, "segmentation": {"size": [50, 100], "counts": "0" * 50}}),
            r"'segmentation': expected run lengths of size",
        ),
        (
            "segment",
            "i.json",
            instances({"image_id": 7, "category_id": 3, "segmentation": POLYGON, "iscrowd": 1}),
            r"i\.json: it holds no question",
        ),
        (
            "refer",
            "r.json",
            instances({"image_id": 7, "bbox": BOX}, {"image_id": 7, "bbox": BOX}),
            r"annotations\[1\]: expected one annotation for each image entry, got another of 7",
        ),
        (
            "refer",
            "r.json",
            instances({"image_id": 7, "bbox": BOX, "segmentation": POLYGON}, {"image_id": 8, "bbox": BOX}),
            r"annotations\[1\]: 'segmentation' is missing",
        ),
    ],
)
def test_bad_files(run: Run, tmp_path: Path, task: str, name: str, content: Any, message: str) -> None:
    path = write(tmp_path / name, content)
    done = run("--task", task, "--data", path, "--checkpoint", tmp_path / "missing")
    assert re.search(message, done.error), done.err


def test_missing_files(run: Run, lines: Path, tmp_path: Path) -> None:
    missing = ("--checkpoint", tmp_path / "missing")
    done = run("--task", "jsonl", "--data", tmp_path / "none.jsonl", *missing)
    assert done.error == f"--data {tmp_path / 'none.jsonl'}: no such file"
    (tmp_path / "1.png").unlink()
    done = run("--task", "jsonl", "--data", lines, *missing)
    assert done.error == f"{tmp_path / '1.png'}: no such image file; --images says where they are"
    done = run("--task", "jsonl", "--data", lines, "--images", tmp_path / "nowhere", *missing)
    message = "no such image file (and 2 more are missing); --images says where they are"
    assert done.error == f"{tmp_path / 'nowhere' / '0.png'}: {message}"
    questions, annotations = vqa_files(tmp_path)
    write(annotations, {"annotations": [{"question_id": 1, "answers": [{"answer": "x"}]}]})
    done = run("--task", "vqa", "--data", questions, "--annotations", annotations, *missing)
    assert done.error == f"{questions}: questions[1]: {annotations} holds no answers to question 2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "{question}"), r"--prompt '\{question\}': \{question\} is none of \{prefix\}, \{lang\}"),
        (("--prompt", "{prefix.x}"), r"--prompt '\{prefix\.x\}': \{prefix\.x\} is none of"),
        (("--prompt", "{"), r"--prompt '\{': "),
        (("--prompt", "\udc80"), r"--prompt '.*': it holds U\+DC80, half of a surrogate pair"),
        (("--prompt", "{}"), r"--prompt '\{\}': \{\} is none of"),
        (("--limit", 0), r"--limit: expected at least 1 for jsonl, got 0"),
        (("--annotations", "a.json"), r"--annotations: goes with --task vqa and one file of questions"),
    ],
    ids=str,
)
def test_bad_options(run: Run, lines: Path, tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    done = run("--task", "jsonl", "--data", lines, "--checkpoint", tmp_path / "missing", *options)
    assert re.match(message, done.error), done.err


def test_a_batch_and_an_answer_have_a_size(run: Run, lines: Path, checkpoints: Callable[[str], Path]) -> None:
    arguments = ("--task", "jsonl", "--data", lines, "--checkpoint", checkpoints("fox"))
    assert run(*arguments, "--batch-size", 0).error == "--batch-size: expected at least 1, got 0"
    assert run(*arguments, "--max-new-tokens", 0).error == "max_new_tokens: expected at least 1, got 0"


def test_a_missing_package_is_named_first(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pg_kernels.model.evaluation.run.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="detect needs the package `pycocotools`: .* `evaluate` extra"):
        prepare("detect", [lines])
    assert isinstance(prepare("jsonl", [lines]), Evaluation)


def test_every_task_is_documented() -> None:
    assert ABOUT.keys() == TASKS.keys()
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name, task in TASKS.items():
        assert f"`{name}`" in text and (task.prompt in text or task.prompt == "{verb} {expression}")
