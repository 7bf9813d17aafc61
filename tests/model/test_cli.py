"""The command line on tiny checkpoints: one with random weights, and one that always gives the same answer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import make_answer

import pg_kernels
from pg_kernels import backends
from pg_kernels.model import EMBEDDED_CHECKPOINT, PaliGemma, PaliGemmaConfig, Processor, TextConfig, VisionConfig, cli
from pg_kernels.model.embedded.vocabulary import train_tokenizer
from pg_kernels.model.locations import Detection
from pg_kernels.model.tokenizer import Tokenizer
from pg_kernels.ops._common.extension import instruction_sets

POSITIONS = 128
SIZE = (80, 60)  # of the picture, in pixels
# the label ends in a letter that the tokenizer encodes as two bytes
ANSWER = "<loc0100><loc0200><loc0600><loc0700> fox ж"
BOX = [200 / 1023 * 80, 100 / 1023 * 60, 700 / 1023 * 80, 600 / 1023 * 60]


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Result:
        code = cli.main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(path)
    return path


def tiny_config(tokenizer: Tokenizer, *, tied: bool = True) -> PaliGemmaConfig:
    return PaliGemmaConfig(
        vision_config=VisionConfig(32, 48, 1, 2, image_size=28),
        text_config=TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=POSITIONS,
        ),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=tied,
    )


def save(model: PaliGemma, tokenizer: Tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    config = model.config
    Processor(
        tokenizer,
        image_size=config.vision_config.image_size,
        num_image_tokens=config.vision_config.num_image_tokens,
        image_token_id=config.image_token_id,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def random_model(tokenizer: Path) -> PaliGemma:
    torch.manual_seed(0)
    return PaliGemma(tiny_config(Tokenizer.from_file(tokenizer)))


@pytest.fixture(scope="module")
def random_checkpoint(random_model: PaliGemma, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model, Tokenizer.from_file(tokenizer), tmp_path_factory.mktemp("checkpoints") / "random")


def save_answering(answer: str, tokenizer: Path, folder: Path) -> Path:
    """Write a checkpoint that always gives the same answer."""
    text = Tokenizer.from_file(tokenizer)
    torch.manual_seed(0)
    model = PaliGemma(tiny_config(text, tied=False))
    make_answer(model, text, answer)
    return save(model, text, folder)


@pytest.fixture(scope="module")
def answering(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_answering(ANSWER, tokenizer, tmp_path_factory.mktemp("checkpoints") / "answering")


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the random checkpoint that a test can damage."""
    return Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def error_of(result: Result) -> str:
    """Return the one line that says why a command failed."""
    assert (result.code, result.out) == (1, ""), result.err
    lines = [line for line in result.err.splitlines() if not re.match(r"loaded .+ in [0-9.]+ s$", line)]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("pg-kernels: error: ")
    return lines[0].removeprefix("pg-kernels: error: ")


# run


def test_the_answer_goes_to_stdout(run: Run, answering: Path, picture: Path) -> None:
    done = run("run", picture, "detect fox", "--checkpoint", answering)
    assert done.code == 0
    x1, y1, x2, y2 = (round(edge) for edge in BOX)
    assert done.out == f"{ANSWER}\n  fox ж: x {x1}–{x2}, y {y1}–{y2}\n"
    assert "fox" not in done.err and f"loaded {answering} on " in done.err and "first token after" in done.err


def test_without_a_checkpoint_the_shipped_one_answers(
    run: Run, answering: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.common, "EMBEDDED_CHECKPOINT", answering)
    assert run("run", picture, "detect fox").out.startswith(ANSWER)


def test_json(run: Run, answering: Path, picture: Path) -> None:
    done = run("run", picture, "detect fox", "--checkpoint", answering, "--json")
    assert done.code == 0 and done.out.count("\n") == 1
    content = json.loads(done.out)
    assert list(content) == ["text", "objects", "tokens", "seconds"]
    assert content["text"] == ANSWER and content["seconds"] > 0
    (thing,) = content["objects"]
    assert 0 < thing.pop("score") <= 1
    assert thing == {"label": "fox ж", "box": pytest.approx(BOX, abs=0.01), "mask_pixels": None, "mask": None}
    text = Tokenizer.from_pretrained(answering)
    assert content["tokens"] == len(text.encode(ANSWER)) + 1  # the end token


@pytest.mark.parametrize("prompt", ["detect fox", "caption en", ""])
def test_streaming_prints_the_same(
    run: Run, answering: Path, random_checkpoint: Path, picture: Path, prompt: str
) -> None:
    for folder in (answering, random_checkpoint):
        arguments = ("run", picture, prompt, "--checkpoint", folder, "--max-new-tokens", 12)
        whole, streamed = run(*arguments), run(*arguments, "--stream")
        assert whole.code == streamed.code == 0
        assert streamed.out == whole.out


def test_streaming_prints_pieces_as_they_come(answering: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []
    monkeypatch.setattr("builtins.print", lambda text="", *, file=None, **_: pieces.append(text) if not file else None)
    assert cli.main(["run", str(picture), "detect fox", "--checkpoint", str(answering), "--stream"]) == 0
    arrived = pieces[:-2]  # without the text after it and without the object
    assert "".join(arrived) == ANSWER and len(list(filter(None, arrived))) > 4


def test_answers_end_at_the_limit(run: Run, answering: Path, picture: Path) -> None:
    done = run("run", picture, "detect fox", "--checkpoint", answering, "--max-new-tokens", 2)
    assert done.out == "<loc0100><loc0200>\n"


def test_beam_search(run: Run, answering: Path, picture: Path) -> None:
    done = run("run", picture, "detect fox", "--checkpoint", answering, "--num-beams", 3)
    assert done.out.splitlines()[0] == ANSWER and "tokens in" in done.err


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype(run: Run, answering: Path, picture: Path, dtype: str) -> None:
    done = run("run", picture, "detect fox", "--checkpoint", answering, "--dtype", dtype)
    assert done.out.splitlines()[0] == ANSWER


def test_draws_depend_on_the_seed_alone(run: Run, random_checkpoint: Path, picture: Path) -> None:
    def draw(seed: int) -> str:
        options = ("--temperature", 3.0, "--top-k", 500, "--top-p", 0.99, "--max-new-tokens", 8, "--seed", seed)
        done = run("run", picture, "caption en", "--checkpoint", random_checkpoint, *options)
        assert done.code == 0
        return done.out

    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_several_images(run: Run, answering: Path, random_checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    """All images belong to one prompt. Boxes are in pixels of the last image."""
    large = tmp_path / "large.png"
    Image.new("RGB", (1023, 1023)).save(large)
    done = run("run", picture, large, "detect fox", "--checkpoint", answering)
    assert done.out.splitlines()[1] == "  fox ж: x 200–700, y 100–600"
    written_out = run("run", picture, large, "<image><image>caption en", "--checkpoint", random_checkpoint)
    assert written_out.out == run("run", picture, large, "caption en", "--checkpoint", random_checkpoint).out


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_images_of_odd_sizes(run: Run, random_checkpoint: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "small.png")
    done = run("run", tmp_path / "small.png", "caption en", "--checkpoint", random_checkpoint, "--max-new-tokens", 3)
    assert done.code == 0 and done.out.endswith("\n")


@pytest.mark.parametrize("name", ["boxes.png", "boxes.JPG"])
def test_drawing(run: Run, answering: Path, picture: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "drawn" / name
    target.parent.mkdir()
    done = run("run", picture, "detect fox", "--checkpoint", answering, "--draw", target)
    assert done.code == 0 and f"wrote {target}" in done.err
    with Image.open(target) as drawn, Image.open(picture) as original:
        assert drawn.format == ("PNG" if name.endswith("png") else "JPEG") and drawn.size == SIZE
        assert np.any(np.asarray(drawn) != np.asarray(original))
    assert os.listdir(target.parent) == [name]


def test_masks(run: Run, tokenizer: Path, picture: Path, tmp_path: Path) -> None:
    codes = "".join(f"<seg{code:03d}>" for code in range(0, 128, 8))
    folder = save_answering(f"<loc0000><loc0001><loc1022><loc1023>{codes} fox", tokenizer, tmp_path / "segmenting")
    decoder = Path(__file__).parent.parent / "fixtures" / "seg_vae.params.npz"
    arguments = ("run", picture, "segment fox", "--checkpoint", folder)
    done = run(*arguments, "--mask-decoder", decoder, "--json")
    assert done.code == 0, done.err
    (thing,) = json.loads(done.out)["objects"]
    assert thing["label"] == "fox" and 0 < thing["mask_pixels"] < SIZE[0] * SIZE[1]
    assert f", mask of {thing['mask_pixels']} pixels\n" in run(*arguments, "--mask-decoder", decoder).out
    (without,) = json.loads(run(*arguments, "--json").out)["objects"]
    mask = pycocotools.mask.frPyObjects(thing["mask"], *thing["mask"]["size"])
    assert thing["mask"]["size"] == [SIZE[1], SIZE[0]] and pycocotools.mask.area(mask) == thing["mask_pixels"]
    assert without == thing | {"mask_pixels": None, "mask": None}


def test_a_failed_drawing_leaves_the_old_one(
    run: Run, answering: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(image: Image.Image, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    target = tmp_path / "drawn" / "boxes.png"
    target.parent.mkdir()
    target.write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", full)
    done = run("run", picture, "detect fox", "--checkpoint", answering, "--draw", target)
    assert done.code == 1 and "No space left on device" in done.err and "boxes" in done.err
    assert os.listdir(target.parent) == ["boxes.png"] and target.read_bytes() == b"old"


def test_a_big_vision_checkpoint(
    run: Run, random_model: PaliGemma, random_checkpoint: Path, tokenizer: Path, picture: Path, tmp_path: Path
) -> None:
    npz = tmp_path / "model.npz"
    random_model.save_big_vision(npz)
    options = ("--max-new-tokens", 6)
    done = run("run", picture, "caption en", "--checkpoint", npz, "--tokenizer", tokenizer, *options)
    assert done.code == 0, done.err
    assert done.out == run("run", picture, "caption en", "--checkpoint", random_checkpoint, *options).out
    message = error_of(run("run", picture, "caption en", "--checkpoint", npz))
    assert message == f"{npz} holds no tokenizer: give one with --tokenizer tokenizer.model"
    message = error_of(run("run", picture, "x", "--checkpoint", npz, "--tokenizer", tmp_path / "none.model"))
    assert message.startswith(f"{tmp_path / 'none.model'}: no such file")
    message = error_of(run("run", picture, "x", "--checkpoint", npz, "--tokenizer", picture))
    assert message.startswith(f"{picture}: not a sentencepiece model")


def test_images_that_cannot_be_read(run: Run, random_checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    arguments = ("run", path, "caption en", "--checkpoint", random_checkpoint)
    assert error_of(run(*arguments)) == f"{path}: no such image file"
    path.write_text("not an image")
    assert error_of(run(*arguments)) == f"{path}: not an image, or of a format Pillow cannot read"
    path.write_bytes(picture.read_bytes()[:2000])
    assert error_of(run(*arguments)).startswith(f"{path}: cannot read the image, it may be truncated (")
    path.write_bytes(b"")
    assert error_of(run(*arguments)).startswith(f"{path}: not an image")
    assert error_of(run("run", tmp_path, "x", "--checkpoint", random_checkpoint)) == f"{tmp_path}: no such image file"
    assert str(path) in error_of(run("run", picture, path, "x", "--checkpoint", random_checkpoint))


def test_checkpoints_that_cannot_be_read(run: Run, checkpoint: Path, picture: Path) -> None:
    arguments = ("run", picture, "caption en", "--checkpoint", checkpoint)
    assert run(*arguments, "--max-new-tokens", 1).code == 0
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())

    (checkpoint / "tokenizer.model").rename(checkpoint / "other.model")
    assert error_of(run(*arguments)).startswith(f"{checkpoint}: tokenizer.model is missing")
    (checkpoint / "other.model").rename(checkpoint / "tokenizer.model")

    for size in (0, 5, 1000, len(whole) - 1):
        weights.write_bytes(whole[:size])
        assert error_of(run(*arguments)).startswith(f"{weights} cannot be read as safetensors: ")
    weights.write_bytes(whole)

    key = "language_model.model.norm.weight"
    save_file(load_file(weights) | {key: torch.zeros(63)}, weights, metadata={"format": "pt"})
    assert f"{weights}: {key} has shape [63] for " in (message := error_of(run(*arguments)))
    assert message.endswith("expected [64]")
    tensors = load_file(weights)
    del tensors[key]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert error_of(run(*arguments)) == f"{checkpoint}: 1 tensor(s) missing: {key}"
    weights.unlink()
    assert error_of(run(*arguments)) == f"{checkpoint} has neither model.safetensors nor model.safetensors.index.json"

    config.write_text(json.dumps(settings | {"model_type": "llava"}))
    assert error_of(run(*arguments)) == f"{config}: model_type is 'llava', expected 'paligemma'"
    config.write_text("{")
    assert error_of(run(*arguments)).startswith(f"{config} cannot be read as a JSON object: ")
    config.unlink()
    assert error_of(run(*arguments)) == f"{config} does not exist"
    shutil.rmtree(checkpoint)
    assert error_of(run(*arguments)).startswith(f"{checkpoint} does not exist; expected a Hugging Face folder or ")
    checkpoint.write_text("not a zip file")
    assert error_of(run(*arguments)).startswith(f"{checkpoint} cannot be read as .npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", -1), r"temperature: expected 0 or more, got -1\.0"),
        (("--max-new-tokens", 0), r"max_new_tokens: expected at least 1, got 0"),
        (
            ("--max-new-tokens", 128),
            r"max_new_tokens: \d+ prompt tokens and 128 new ones are more than the model's 128",
        ),
        (("--top-k", 3), r"top_k and top_p: they need a temperature above 0"),
        (("--top-k", 0, "--temperature", 1), r"top_k: expected at least 1, got 0"),
        (("--top-p", 1.5, "--temperature", 1), r"top_p: expected a number in \(0, 1\], got 1\.5"),
        (("--num-beams", 0), r"num_beams: expected at least 1, got 0"),
        (("--num-beams", 2, "--temperature", 1), r"num_beams: beam search neither draws"),
        (("--num-beams", 2, "--stream"), r"--stream prints text as it comes: it goes with neither --json nor --num-b"),
        (("--json", "--stream"), r"--stream prints text as it comes: it goes with neither --json nor --num-b"),
        (("--seed", 2**70, "--temperature", 1), rf"--seed: .*got {2**70}"),
        (("--tokenizer", "t.model"), r"--tokenizer is for \.npz checkpoints; .* is a folder with its own"),
        (("--mask-decoder", "none.npz"), r".*none\.npz"),
        (("--device", "abacus"), r"--device abacus: "),
        (("--device", "cuda:99"), r"--device cuda:99: "),
        (("--device", "meta"), r"--device meta: "),
    ],
    ids=str,
)
def test_options_out_of_range(
    run: Run, random_checkpoint: Path, picture: Path, options: tuple[object, ...], message: str
) -> None:
    done = run("run", picture, "caption en", "--checkpoint", random_checkpoint, *options)
    assert re.match(message, error_of(done)), done.err


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("very long " * 60, r"prompts\[0\]: 4 image tokens and \d+ text tokens make \d+; the model takes at most 128$"),
        ("<image><image> caption en", r"prompts\[0\]: 2 <image> in it, but 1 images are given$"),
    ],
    ids=["long", "placeholders"],
)
def test_prompts_that_do_not_fit(run: Run, random_checkpoint: Path, picture: Path, prompt: str, message: str) -> None:
    done = run("run", picture, prompt, "--checkpoint", random_checkpoint)
    assert re.match(message, error_of(done)), done.err


def test_an_empty_prompt_is_allowed(run: Run, answering: Path, picture: Path) -> None:
    """A line break in a prompt is a newline for the model, as in transformers."""
    assert run("run", picture, "", "--checkpoint", answering).out.startswith(ANSWER)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/boxes.png", "cannot be written; it must be a file in an existing, writable folder"),
        ("folder.png", "cannot be written; it must be a file in an existing, writable folder"),
        ("boxes.xyz", "Pillow writes no format with the ending '.xyz'; .png is a good one"),
        ("boxes", "Pillow writes no format with the ending ''; .png is a good one"),
        ("boxes.psd", "Pillow writes no format with the ending '.psd'; .png is a good one"),  # Pillow only reads it
    ],
)
def test_drawings_that_cannot_be_written(run: Run, picture: Path, tmp_path: Path, name: str, message: str) -> None:
    """Bad options are refused before the (missing) checkpoint is read."""
    (tmp_path / "folder.png").mkdir()
    target = tmp_path / name
    done = run("run", picture, "detect fox", "--checkpoint", tmp_path / "missing", "--draw", target)
    assert error_of(done) == f"--draw {target}: {message}"


def test_only_one_image_is_drawn_on(run: Run, picture: Path, tmp_path: Path) -> None:
    done = run("run", picture, picture, "x", "--checkpoint", tmp_path / "missing", "--draw", tmp_path / "boxes.png")
    assert error_of(done) == "--draw draws on one image, got 2"


# info


def test_info(run: Run) -> None:
    done = run("info")
    assert (done.code, done.err) == (0, "")
    assert f"pg_kernels  {pg_kernels.__version__}" in done.out and f"torch       {torch.__version__}" in done.out
    used, available = instruction_sets()
    assert f"extension   {used} (any of them by PG_KERNELS_ISA: {', '.join(available)})" in done.out or not used
    table = done.out.partition("Backend of each op on cpu")[2].partition("Backend of each op on cuda")[0]
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in table.splitlines()[1:] if line.strip()}
    expected = backends.explain("cpu")
    assert rows.keys() == expected.keys() and {"int8_linear", "prefix_lm_attention"} <= rows.keys()
    for op, (backend, reasons) in expected.items():
        assert rows[op][0] == backend
        assert all(reason in rows[op][1] for reason in reasons.values())


# convert


def test_convert_there_and_back(
    run: Run, random_checkpoint: Path, tokenizer: Path, picture: Path, tmp_path: Path
) -> None:
    npz, folder = tmp_path / "model.npz", tmp_path / "again"
    there = run("convert", random_checkpoint, npz)
    back = run("convert", npz, folder, "--tokenizer", tokenizer)
    assert (there.code, there.out, there.err) == (0, "", f"wrote {npz}\n")
    assert (back.code, back.out, back.err) == (0, "", f"wrote {folder}\n")
    before, after = (load_file(path / "model.safetensors") for path in (random_checkpoint, folder))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    processor = Processor.from_pretrained(folder)
    assert processor.decode(processor.tokenizer.encode("a fox")) == ["a fox"]
    assert (folder / "preprocessor_config.json").is_file()
    answers = [
        run("run", picture, "caption en", "--checkpoint", path, "--max-new-tokens", 6)
        for path in (random_checkpoint, folder)
    ]
    assert answers[0].code == 0 and answers[0].out == answers[1].out


def test_convert_between_folders(run: Run, random_checkpoint: Path, tmp_path: Path) -> None:
    done = run("convert", random_checkpoint, tmp_path / "half", "--dtype", "bfloat16")
    assert done.code == 0
    before, after = (load_file(path / "model.safetensors") for path in (random_checkpoint, tmp_path / "half"))
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert len(Processor.from_pretrained(tmp_path / "half").tokenizer) == len(
        Processor.from_pretrained(random_checkpoint).tokenizer
    )


def test_conversions_that_fail(run: Run, random_checkpoint: Path, answering: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    npz = tmp_path / "model.npz"
    assert error_of(run("convert", tmp_path / "none", npz)).startswith(f"{tmp_path / 'none'} does not exist")
    assert str(tmp_path / "file") in error_of(run("convert", random_checkpoint, tmp_path / "file" / "out"))
    assert "no place for an output head" in error_of(run("convert", answering, npz))
    message = error_of(run("convert", random_checkpoint, npz, "--tokenizer", random_checkpoint / "tokenizer.model"))
    assert message == f"tokenizer is given, but {npz} is an .npz file, which has no place for it"
    for name, reason in (("none", "no such file"), ("file", "not a sentencepiece model")):
        message = error_of(run("convert", random_checkpoint, tmp_path / "out", "--tokenizer", tmp_path / name))
        assert message.startswith(f"{tmp_path / name}: {reason}")
    assert os.listdir(tmp_path) == ["file"]


# As a separate process


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "only-an-image.png"],
        ["run", "a.png", "x", "--resize", "crop"],
        ["run", "a.png", "x", "--dtype", "int3"],
        ["run", "a.png", "x", "--max-new-tokens", "many"],
        ["run", "a.png", "x", "--unknown"],
        ["info", "extra"],
        ["convert", "only-a-source"],
    ],
    ids=" ".join,
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.startswith("usage: pg-kernels")


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(device_type: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(backends, "explain", interrupt)
    done = run("info")
    assert (done.code, done.err) == (130, "pg-kernels: interrupted\n")


MODULE = [sys.executable, "-m", "pg_kernels"]


def test_version() -> None:
    done = subprocess.run([*MODULE, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"pg_kernels {pg_kernels.__version__}\n", "")


def test_help_and_usage_errors_start_without_torch() -> None:
    """Importing torch takes more than a second."""
    commands = [command.__name__.rpartition(".")[2] for command in cli.COMMANDS]
    words = [
        ["--version"],
        ["--help"],
        [],
        ["nothing"],
        *([name, "--help"] for name in commands),
        ["run"],
        ["finetune"],
    ]
    code = (
        "import contextlib, sys\n"
        "from pg_kernels.model.cli import main\n"
        f"for words in {words}:\n"
        "    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):\n"
        "        main(words)\n"
        "print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr.count("usage: ") == len(words) - 1  # all but --version


def test_a_reader_that_goes_away() -> None:
    """A closed pipe gives no traceback, also if buffered text is flushed at exit (`pg-kernels info | head -0`)."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([*MODULE, "info"], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


# int8


def test_quantised_answers(run: Run, answering: Path, picture: Path) -> None:
    for mode in ("int8", "int8-dynamic"):
        done = run("run", picture, "detect fox", "--checkpoint", answering, "--quantize", mode)
        assert done.code == 0 and done.out.startswith(f"{ANSWER}\n")
        assert f"as {mode} on cpu in" in done.err


def test_comparing_on_pictures(run: Run, random_checkpoint: Path, picture: Path) -> None:
    arguments = ["compare", picture, picture, "--checkpoint", random_checkpoint, "--prompt", "detect fox"]
    done = run(*arguments)
    assert done.code == 0, done.err
    assert "Relative error of each layer's output, int8 against the original:" in done.out
    assert re.search(r"model\.language_model\.layers\.1 +\d\.\d+%", done.out)
    assert re.search(r"Over \d+ tokens of 2 answers:", done.out) and "same answers" in done.out
    content = json.loads(run(*arguments, "--json", "--quantize", "int8-dynamic").out)
    assert content["prompts"] == 2 and content["scores"] == {} and content["quantize"] == "int8-dynamic"
    assert content["checkpoint"] == str(random_checkpoint) and content["versions"]["torch"] == torch.__version__
    assert all(0 < error < 0.2 for error in content["layers"].values()) and content["kl_divergence"] > 0


def test_comparing_the_built_in_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from pg_kernels.model.embedded import world

    sample = Image.open(EMBEDDED_CHECKPOINT / "samples" / "banana_and_owl.png").resize((224, 224))
    objects = [Detection("banana", (1, 48, 84, 142)), Detection("owl", (105, 56, 165, 135))]
    fake = type("World", (), {"scene": lambda self, rng, size, **_: world.Picture(sample, objects)})
    monkeypatch.setattr(world, "World", fake)
    monkeypatch.setattr(cli.compare, "_COMPARED", (("caption", "en"), ("detect", "")))
    done = run("compare", "--pictures", 2)
    assert done.code == 0, done.err
    assert "\noriginal\n" in done.out and "\nint8\n" in done.out
    assert len(re.findall(r"caption en +exact match +100.0% of 2", done.out)) == 2
    assert len(re.findall(r"detect +AP50 +100.0% of 2", done.out)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PICTURE"], "give images with --checkpoint"),
        (["--checkpoint", "CHECKPOINT"], "give images with --checkpoint"),
        (["--pictures", "0"], "--pictures: expected at least 1, got 0"),
    ],
)
def test_comparisons_that_do_not_fit(
    run: Run, random_checkpoint: Path, picture: Path, arguments: list[str], message: str
) -> None:
    places = {"PICTURE": picture, "CHECKPOINT": random_checkpoint}
    assert message in error_of(run("compare", *(places.get(argument, argument) for argument in arguments)))
