"""Files beside weights and tokenizer are kept: mask decoder, generation_config.json, chat template, licence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pg_kernels.model import EMBEDDED_CHECKPOINT, PaliGemma, PaliGemmaConfig, Processor, TextConfig, VisionConfig, cli
from pg_kernels.model.checkpoints.conversion import convert
from pg_kernels.model.tokenizer import Tokenizer

GENERATION = {"bos_token_id": 2, "eos_token_id": [1, 49], "pad_token_id": 0, "max_new_tokens": 20, "_from": "a person"}
BESIDE = {"chat_template.jinja": "{{ messages }}", "LICENSE": "as is", "NOTICE.txt": "notice"}
SEGMENTED = "<loc0100><loc0100><loc0900><loc0900>" + "".join(f"<seg{i:03}>" for i in range(16)) + " bear"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "hf"
    shipped = Processor.from_pretrained(EMBEDDED_CHECKPOINT)
    tokenizer = Tokenizer.from_pretrained(EMBEDDED_CHECKPOINT)
    torch.manual_seed(0)
    text = TextConfig("gemma", len(tokenizer), 32, 48, 1, 2, 1, 16, max_position_embeddings=64)
    PaliGemma(
        PaliGemmaConfig(VisionConfig(32, 48, 1, 2, image_size=28), text, tokenizer.image_token_id)
    ).save_pretrained(path)
    processor = Processor(tokenizer, image_size=28, num_image_tokens=4, mask_decoder=shipped.mask_decoder)
    processor.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps(GENERATION))
    for name, content in BESIDE.items():
        (path / name).write_text(content)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    return path


def assert_masks(path: Path) -> None:
    """A saved folder's processor decodes masks bit-equally to the processor that it was made from."""
    found, expected = (
        Processor.from_pretrained(folder).parse(SEGMENTED, size=(64, 48))[0].mask
        for folder in (path, EMBEDDED_CHECKPOINT)
    )
    assert found is not None and expected is not None and expected.any() and (found == expected).all()
    codes = torch.arange(16)[None]
    decoders = [Processor.from_pretrained(folder).mask_decoder for folder in (path, EMBEDDED_CHECKPOINT)]
    assert torch.equal(*(decoder.decode(codes) for decoder in decoders if decoder is not None))
    mask, box = torch.ones(8, 8), (0.0, 0.0, 8.0, 8.0)
    assert torch.equal(*(decoder.encode(mask, box) for decoder in decoders if decoder is not None))


def generation(path: Path) -> dict:
    return json.loads((path / "generation_config.json").read_text())


def test_a_processor_writes_its_mask_decoder(folder: Path, tmp_path: Path) -> None:
    assert_masks(folder)
    processor = Processor.from_pretrained(folder, mask_decoder=EMBEDDED_CHECKPOINT / "vae-oid.npz")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    processor.save_pretrained(tmp_path)
    assert_masks(tmp_path)
    processor.mask_decoder = None
    (tmp_path / "without").mkdir()
    processor.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "vae-oid.npz").exists()


@pytest.mark.parametrize("by", ["python", "command line"])
def test_converting(folder: Path, tmp_path: Path, by: str) -> None:
    target = tmp_path / "out"
    if by == "python":
        convert(folder, target, dtype=torch.bfloat16)
    else:
        assert cli.main(["convert", str(folder), str(target)]) == 0
    assert_masks(target)
    for name in ("generation_config.json", "tokenizer_config.json", "preprocessor_config.json", "vae-oid.npz", *BESIDE):
        assert (target / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("options", [(), ("--lora", "2", "--merge")], ids=" ".join)
def test_fine_tuning(folder: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (tmp_path / "lines.jsonl").write_text(json.dumps({"image": "red.png", "prefix": "segment bear", "suffix": "bear"}))
    output = tmp_path / "out"
    arguments = ["--checkpoint", str(folder), "--data", str(tmp_path / "lines.jsonl"), "--output", str(output)]
    assert cli.main(["finetune", *arguments, "--steps", "1", "--batch-size", "1", "--workers", "0", *options]) == 0
    assert all((output / name).read_text() == content for name, content in BESIDE.items())
    assert generation(output) == GENERATION
    assert_masks(output)


def test_a_generation_config_stays_with_the_model(folder: Path, tmp_path: Path) -> None:
    PaliGemma.from_pretrained(folder, quantize="int8").save_pretrained(tmp_path / "int8")
    assert generation(tmp_path / "int8") == GENERATION
    PaliGemma.from_pretrained(tmp_path / "int8").save_pretrained(tmp_path / "int8")
    assert generation(tmp_path / "int8") == GENERATION
    # A model loaded without a generation config keeps the folder's file, and writes its own ids if there is none.
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    model = PaliGemma(replace(PaliGemma.from_pretrained(folder).config, eos_token_id=1))
    model.save_pretrained(tmp_path / "new")
    assert generation(tmp_path / "new") == {"eos_token_id": [1, 7]}
    model.save_pretrained(tmp_path / "newer")
    assert generation(tmp_path / "newer") == {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
