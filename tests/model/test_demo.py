"""The demonstration: one sample for each task, and the sheet that shows the answers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pg_kernels.model import EMBEDDED_CHECKPOINT, Processor, cli
from pg_kernels.model.embedded.demo import samples, sheet
from pg_kernels.model.embedded.tasks import TASKS
from pg_kernels.model.training.data import Example

KINDS = {"caption": "caption", "ocr": "ocr", "detect": "detect", "segment": "segment"}


def test_there_is_a_sample_for_each_task() -> None:
    examples = samples()
    assert len(examples) == len(TASKS)
    kinds = [KINDS.get(example.prefix.split()[0], example.prefix) for example in examples]
    assert len(set(kinds)) == len(TASKS) and set(KINDS.values()) <= set(kinds)
    assert sorted({len(example.images) for example in examples}) == [1, 2]


def test_the_demo_answers_every_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The built-in model gives the answers that the samples' lines record."""
    assert cli.main(["demo", "--draw", str(tmp_path / "sheet.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, example in zip(lines, samples(), strict=True):
        said = re.sub(r"<(loc|seg)[0-9]+>", "", line.partition(": ")[2])
        assert repr(example.prefix) in line
        assert said.strip("'\" ") == re.sub(r"<(loc|seg)[0-9]+>", "", repr(example.suffixes[0])).strip("'\" ")
    with Image.open(tmp_path / "sheet.png") as drawn:
        assert drawn.width > drawn.height > 600


def test_the_makefile_draws_where_git_does_not_look() -> None:
    root = Path(__file__).parents[2]
    drawn = re.findall(r"^\t.*pg-kernels demo --draw (\S+)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert drawn and {f"/{name}" for name in drawn} <= set((root / ".gitignore").read_text().splitlines())


def test_a_drawing_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--draw", str(tmp_path / "missing" / "sheet.png")]) == 1
    streams = capsys.readouterr()
    assert "--draw" in streams.err and streams.out == ""


def test_the_sheet_shows_pictures_and_boxes(tmp_path: Path) -> None:
    for name, colour in (("red.png", (200, 0, 0)), ("green.png", (0, 160, 0))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    red, green = tmp_path / "red.png", tmp_path / "green.png"
    examples = [Example((red,), "detect wall", ("",)), Example((red, green), "answer en which is green?", ("second",))]
    texts = ["<loc0100><loc0100><loc0900><loc0900> wall", "second"]
    drawn = np.asarray(sheet(Processor.from_pretrained(EMBEDDED_CHECKPOINT), examples, texts)).astype(int)
    red_pixels = (drawn == (200, 0, 0)).all(-1)
    green_pixels = (drawn == (0, 160, 0)).all(-1)
    left, right = np.split(red_pixels, [drawn.shape[1] // 4], axis=1)
    assert left.sum() > 2 * right.sum() > 0 and green_pixels.sum() > 5_000
    assert 0.2 < left.sum() / 280**2 < 0.98  # an outline and a label cover a part of it
