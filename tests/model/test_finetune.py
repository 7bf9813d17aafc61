"""`pg-kernels finetune` on a tiny random model: pictures of one colour, with questions about them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny import COLOURS, FAST, write_lines

from pg_kernels.integrations.peft import register
from pg_kernels.model import PaliGemma, Processor, cli
from pg_kernels.model.training.data import Collator, Example, JsonLines
from pg_kernels.model.training.state import State


def finetune(*arguments: object) -> int:
    return cli.main(["finetune", *map(str, arguments)])


def evaluations(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "evaluation"]


def answers(model: Any, folder: Path, data: Path) -> list[str]:
    processor = Processor.from_pretrained(folder)
    images = [data.parent / f"{colour}.png" for colour in COLOURS]
    return processor.decode(model.generate(**processor(images, ["what"] * 3), max_new_tokens=8))


def test_a_model_is_trained_evaluated_and_written(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    common = ("--checkpoint", checkpoint, "--data", data, "--eval-data", data, "--output", tmp_path / "out", *FAST)
    assert finetune(*common, "--epochs", 30, "--freeze", "vision_tower", "lm_head") == 0
    before, after = evaluations(tmp_path / "out")
    assert before["step"] == 0 and before["exact_match"] == 0
    assert after["step"] == 30 and after["exact_match"] == 1 and after["loss"] < 0.3 * before["loss"]
    model = PaliGemma.from_pretrained(tmp_path / "out")
    assert answers(model, tmp_path / "out", data) == list(COLOURS)
    old, new = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    frozen = {name for name in old if torch.equal(old[name], new[name])}
    assert frozen == {name for name in old if "vision_tower" in name or "embed_tokens" in name}


def test_an_output_folder_is_not_overwritten_by_mistake(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--checkpoint", checkpoint, "--data", data, "--output", tmp_path / "out", "--steps", 1, *FAST)
    assert finetune(*common) == 0
    written = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    assert finetune(*common, "--save-every", 3) == 0
    assert "out holds the result of this run already" in capsys.readouterr().err
    assert finetune(*common, "--seed", 3) == 1
    assert "out holds a model already (config.json); use another folder, or restart" in capsys.readouterr().err
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == written
    assert finetune(*common, "--restart") == 0
    assert finetune(*common, "--restart", "--lora", 2) == 1
    assert "out holds a model of another kind (config.json)" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--quantize", "int8"), ("--quantize", "int8", "--merge")])
def test_an_adapter(checkpoint: Path, data: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    common = ("--checkpoint", checkpoint, "--data", data, "--eval-data", data, "--output", tmp_path / "out", *FAST)
    targets = ("--lora", 8, "--lora-alpha", 32, "--lora-targets", ".*_proj|.*fc.|.*linear")
    assert finetune(*common, *targets, "--steps", 30, *options) == 0
    assert evaluations(tmp_path / "out")[-1]["exact_match"] == 1
    if "--merge" in options:
        model: Any = PaliGemma.from_pretrained(tmp_path / "out")
        assert not (tmp_path / "out/adapter_config.json").exists()
    else:
        base = PaliGemma.from_pretrained(checkpoint, quantize="int8" if options else None)
        config = register(LoraConfig.from_pretrained(tmp_path / "out"))
        assert config.base_model_name_or_path == str(checkpoint)
        model = PeftModel.from_pretrained(base, tmp_path / "out", config=config)
        assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert answers(model, checkpoint, data) == list(COLOURS)


def test_a_killed_run_goes_on_to_the_same_bytes(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    def arguments(folder: str) -> tuple[object, ...]:
        options = (*FAST, "--lora", 4, "--lora-dropout", 0.2, "--steps", 5, "--save-every", 2)
        return ("--checkpoint", checkpoint, "--data", data, "--output", tmp_path / folder, *options)

    def killed() -> None:
        save = State.save

        def save_and_die(state: State) -> None:
            save(state)
            os.kill(os.getpid(), signal.SIGKILL)

        State.save = save_and_die  # type: ignore[method-assign]
        finetune(*arguments("cut"))

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cut/adapter_config.json").exists()
    for folder in ("cut", "whole"):
        assert finetune(*arguments(folder)) == 0
    files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("cut", "whole")]
    assert files[0] == files[1]


def test_another_image_size(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    common = ("--checkpoint", checkpoint, "--data", data, "--output", tmp_path / "out", *FAST)
    assert finetune(*common, "--steps", 1, "--image-size", 42, "--gradient-checkpointing") == 0
    model, processor = PaliGemma.from_pretrained(tmp_path / "out"), Processor.from_pretrained(tmp_path / "out")
    assert model.config.vision_config.image_size == processor.image_size == 42
    assert answers(model, tmp_path / "out", data)


def test_patience(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """With a harmful learning rate the first weights are the best and are kept."""
    common = ("--checkpoint", checkpoint, "--data", data, "--eval-data", data, "--output", tmp_path / "out")
    options = ("--learning-rate", 10, "--warmup", 0, "--workers", 0, "--eval-every", 1, "--patience", 2, "--steps", 9)
    assert finetune(*common, *options) == 0
    assert [line["step"] for line in evaluations(tmp_path / "out")] == [0, 1, 2]
    old, new = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old)


def rank(index: int, port: int, arguments: tuple[object, ...]) -> None:
    os.environ.update(
        RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    os._exit(finetune(*arguments))


def test_an_adapter_by_two_processes(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    def arguments(folder: str) -> tuple[object, ...]:
        options = (*FAST, "--lora", 4, "--quantize", "int8", "--steps", 2, "--gradient-checkpointing")
        return (
            *("--checkpoint", checkpoint, "--data", data, "--eval-data", data),
            *("--output", tmp_path / folder, *options),
        )

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank, args=(index, port, arguments("two"))) for index in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert finetune(*arguments("one")) == 0
    one, two = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("one", "two"))
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    for line, other in zip(evaluations(tmp_path / "one"), evaluations(tmp_path / "two"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_batch_holds_each_image_once(checkpoint: Path, data: Path) -> None:
    processor = Processor.from_pretrained(checkpoint)
    red, blue = data.parent / "red.png", data.parent / "blue.png"
    examples = [
        Example((blue,), "what", ("blue",)),
        Example((), "what", ("nothing", "none")),
        Example((red, blue), "what", ("both",)),
    ]
    batch = Collator(processor)(examples)
    whole = processor([[blue], [], [red, blue]], ["what"] * 3, ["blue", "nothing", "both"], padding_side="right")
    pixels, index = batch.pop("pixel_values"), batch.pop("image_index")
    assert len(pixels) == 2
    assert torch.equal(pixels[index], whole.pop("pixel_values"))
    assert batch.keys() == whole.keys() and all(torch.equal(batch[name], whole[name]) for name in whole)
    batch = Collator(processor, prompts=True)(examples[1:2])
    assert batch["pixel_values"].shape == (1, 3, 28, 28) and batch["image_index"].shape == (0,)
    assert torch.equal(batch["prompt_input_ids"], processor.encode(["what"], [0])["input_ids"])
    assert "prompt_labels" not in batch


GOOD = {"image": "red.png", "prefix": "what", "suffix": "red"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"data.jsonl, line 3: not JSON"),
        ("[]", r"data.jsonl, line 3: expected an object, got list"),
        ({"image": "red.png", "prefix": "what"}, r"line 3, suffix: expected a string .*, got no such key"),
        ({**GOOD, "suffix": []}, r"line 3, suffix: expected a string or a list of strings, got \[\]"),
        ({**GOOD, "prefix": 7}, r"line 3, prefix: expected a string, got 7"),
        ({**GOOD, "image": ["red.png", 1]}, r"line 3, image: expected a string or a list"),
        ({**GOOD, "image": "green.png"}, r"line 3, image: .*green.png does not exist"),
        ({**GOOD, "image": "data.jsonl"}, r"line 3, image: .*data.jsonl is no image"),
        ({**GOOD, "prefix": "<image><image>what"}, r"line 3, prefix: 2 <image> in it, but 1 image"),
        ({**GOOD, "suffix": "<image>"}, r"line 3, suffix: <image> can stand in a prefix only"),
    ],
)
def test_bad_lines_are_named(data: Path, tmp_path: Path, line: Any, message: str) -> None:
    path = write_lines(tmp_path / "data.jsonl", [GOOD, "", line])
    (tmp_path / "red.png").write_bytes((data.parent / "red.png").read_bytes())
    with pytest.raises((ValueError, OSError), match=message):
        JsonLines(path)


def test_lines_too_long_and_files_missing_are_named(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "data.jsonl", [GOOD, {**GOOD, "prefix": "what " * 70}])
    common = ("--checkpoint", checkpoint, "--images", data.parent, "--output", tmp_path / "out", "--steps", 1)
    for given, message in (
        (("--data", path), "line 2: prompts[0]: 4 image tokens"),
        (("--data", tmp_path / "none.jsonl"), "none.jsonl: no such file"),
        (("--data", data, "--eval-data", path), "line 2: prompts[0]"),
        (("--data", data, "--merge"), "--quantize, --merge and the options of an adapter go with --lora"),
        (("--data", data, "--lora-dropout", 0.1), "the options of an adapter go with --lora"),
        (("--data", data, "--lora", 0), "lora: expected a rank of at least 1, got 0"),
        (("--data", data, "--lora", 2, "--lora-targets", "nothing"), "nothing"),
        (("--data", data, "--patience", 1), "patience: needs data to evaluate on"),
        (("--data", data, "--epochs", 2), "steps and epochs: give one of them"),
    ):
        assert finetune(*common, *given) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out/config.json").exists()


def test_int8_weights_are_not_trained(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PaliGemma.from_pretrained(checkpoint, quantize="int8").save_pretrained(tmp_path / "int8")
    Processor.from_pretrained(checkpoint).save_pretrained(tmp_path / "int8")
    common = ("--checkpoint", tmp_path / "int8", "--data", data, "--output", tmp_path / "out", "--steps", 1)
    assert finetune(*common) == 1
    assert "int8 weights cannot be trained" in capsys.readouterr().err
