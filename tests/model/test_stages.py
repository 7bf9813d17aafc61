"""The stages that make the built-in model, reduced to a few steps on plain shapes, and how its scores are counted."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from pg_kernels.model import EMBEDDED_CHECKPOINT, PaliGemma, PaliGemmaConfig, Processor, TextConfig, VisionConfig
from pg_kernels.model.embedded import stages
from pg_kernels.model.embedded.evaluation import ZERO_SHOT, Score, evaluate, held_out_rng, score, table, table_rows
from pg_kernels.model.embedded.stages import (
    STAGES,
    Generated,
    TrainingStage,
    collate,
    train_stages,
    waves,
    with_resolution,
)
from pg_kernels.model.embedded.tasks import LANGUAGES, Questions
from pg_kernels.model.embedded.world import World
from pg_kernels.model.segmentation import MaskVQVAE
from pg_kernels.model.tokenizer import Tokenizer
from pg_kernels.model.training.curves import draw_losses
from pg_kernels.model.training.recipe import Recipe
from pg_kernels.model.training.trainer import suffix_loss

pytestmark = pytest.mark.skipif(
    find_spec("emoji") is None or find_spec("google") is None,
    reason="the tokenizer needs emoji and protobuf (extra: train)",
)

# CPUs without bf16 instructions take ten times as long in bf16, which Muon also uses.
FAST = {"steps": 2, "batch_size": 12, "micro_batch": 6, "precision": "float32", "optimizer": "adamw"}
SHORT = tuple(replace(stage, recipe=replace(stage.recipe, **FAST)) for stage in STAGES)
NAMES = ("fox", "owl", "key", "bus", "star", "house")


@pytest.fixture(scope="module")
def world() -> World:
    return World(
        glyphs={name: Image.new("RGBA", (40, 50), (40 * n, 200 - 30 * n, 90, 255)) for n, name in enumerate(NAMES)}
    )


@pytest.fixture(scope="module")
def codec() -> MaskVQVAE:
    return MaskVQVAE.from_file(EMBEDDED_CHECKPOINT / "vae-oid.npz")


@pytest.fixture(scope="module", autouse=True)
def names_of_shapes() -> object:
    """Return questions about the world of shapes, whose names are the same in every language."""
    with pytest.MonkeyPatch.context() as patch:
        same = {language: {name: name for name in NAMES} for language in LANGUAGES}
        patch.setattr(stages, "Questions", lambda world, codec: Questions(world, codec, same))
        yield


@pytest.fixture(scope="module")
def trained(world: World, codec: MaskVQVAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_stages(folder, world, codec, stages=SHORT, workers=0)
    return folder


def test_every_stage_leaves_a_checkpoint_and_its_losses(trained: Path) -> None:
    for stage in SHORT:
        folder = trained / stage.name
        model, processor = PaliGemma.from_pretrained(folder), Processor.from_pretrained(folder)
        assert processor.image_size == stage.image_size == model.config.vision_config.image_size
        assert model.config.vision_config.patch_size == stage.patch_size
        assert model.config.text_config.vocab_size == len(processor.tokenizer)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2] and all(line["loss"] > 0 for line in lines)
        assert not list(folder.glob("checkpoint*"))


def test_stages_are_reproducible_and_done_ones_are_kept(
    trained: Path, world: World, codec: MaskVQVAE, tmp_path: Path
) -> None:
    last = Path(SHORT[-1].name, "model.safetensors")
    train_stages(tmp_path / "same", world, codec, stages=SHORT[:2], workers=0)
    before = (tmp_path / "same" / SHORT[1].name / "model.safetensors").stat().st_mtime_ns
    train_stages(tmp_path / "same", world, codec, stages=SHORT, workers=0)
    assert (tmp_path / "same" / SHORT[1].name / "model.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "same" / last).read_bytes() == (trained / last).read_bytes()
    train_stages(tmp_path / "from", world, codec, stages=SHORT[3:], start=trained / SHORT[2].name, workers=0)
    assert (tmp_path / "from" / last).read_bytes() == (trained / last).read_bytes()
    train_stages(tmp_path / "other", world, codec, stages=SHORT[:1], seed=1, workers=0)
    first = Path(SHORT[0].name, "model.safetensors")
    assert (tmp_path / "other" / first).read_bytes() != (trained / first).read_bytes()


def test_a_higher_resolution_starts_from_what_was_seen() -> None:
    """Patches of twice the size give the same features for a picture of twice the size. More patches interpolate positions."""
    text = TextConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision = VisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=112, patch_size=14
    )
    model = PaliGemma(
        PaliGemmaConfig(vision, replace(text, num_key_value_heads=1, head_dim=16), image_token_id=49)
    ).eval()
    pixels = torch.rand(1, 3, 112, 112)
    larger = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    stage = TrainingStage("larger", 224, 28, Recipe(steps=1))
    with torch.no_grad():
        torch.testing.assert_close(
            with_resolution(model, stage).eval().get_image_features(larger), model.get_image_features(pixels)
        )
    finer = with_resolution(model, replace(stage, patch_size=14))
    assert finer.config.vision_config.num_image_tokens == 256
    assert finer.get_image_features(larger).shape == (1, 256, 32)


def test_examples_depend_on_stage_seed_and_index_alone(trained: Path, world: World, codec: MaskVQVAE) -> None:
    processor = Processor.from_pretrained(trained / "stage1")
    make = stages.Questions
    data = Generated(make(world, codec), processor, SHORT[1])
    pixels = [data[i]["pixel_values"] for i in (7, 7, 6)]
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])
    other = replace(SHORT[1], recipe=replace(SHORT[1].recipe, seed=1))
    first, second = data.examples(random.Random(0), compare=False), data.examples(random.Random(0), compare=True)
    assert len(first) == 6 and len(second) == 3 and all(len(example.images) == 2 for example in second)
    theirs = Generated(make(world, codec), processor, other)[7]["pixel_values"]
    assert theirs.shape != pixels[0].shape or not torch.equal(theirs, pixels[0])
    assert held_out_rng(0, 7).random() != held_out_rng(1, 7).random()


def test_a_picture_is_encoded_once_for_all_its_questions(trained: Path, world: World, codec: MaskVQVAE) -> None:
    """The loss equals that of the same questions with one picture each."""
    processor = Processor.from_pretrained(trained / "stage1")
    model = PaliGemma.from_pretrained(trained / "stage1", dtype=torch.float32)
    data = Generated(stages.Questions(world, codec), processor, SHORT[1])
    for compare in (False, True):
        examples = data.examples(random.Random(3), compare=compare)
        batch = collate(examples, processor)
        assert len(batch["pixel_values"]) < len(batch["image_index"])
        plain = processor(
            [list(example.images) for example in examples],
            [example.prefix for example in examples],
            suffixes=[example.suffix for example in examples],
        )
        with torch.no_grad():
            expected = model(**plain, loss_reduction="example").loss
            torch.testing.assert_close(suffix_loss(model, batch, SHORT[1].recipe), expected)


def test_scores_of_answers(trained: Path, world: World, codec: MaskVQVAE) -> None:
    """Right answers score 1, or as close as mask codes allow. Empty answers score 0."""
    processor = Processor.from_pretrained(trained / "stage3")
    processor.mask_decoder = codec
    rows = table_rows(stages.Questions(world, codec), processor.image_size)
    assert [language for task, language in rows if task == "caption"] == list(LANGUAGES) and (ZERO_SHOT, "en") in rows
    for (task, language), draw in rows.items():
        examples = [draw(held_out_rng(0, task, i)) for i in range(6)]
        right = score(task, language, examples, [example.suffix for example in examples], processor)
        assert right.value == pytest.approx(1, abs=0.15 if task == "segment" else 1e-6), right
        assert score(task, language, examples, ["" for _ in examples], processor).value == 0
    assert "| ocr |  | exact match | 12.5% | 8 |" in table([Score("ocr", "", "exact match", 0.125, 8)])


def test_evaluation_asks_each_row(trained: Path, world: World, codec: MaskVQVAE) -> None:
    model, processor = PaliGemma.from_pretrained(trained / "stage1"), Processor.from_pretrained(trained / "stage1")
    questions = stages.Questions(world, codec)
    rows = [("caption", "de"), ("count", "en"), ("compare", "en")]
    scores = evaluate(model, processor, questions, count=3, seed=0, rows=rows, batch_size=2)
    assert [(found.task, found.language, found.count) for found in scores] == [(*row, 3) for row in rows]
    with pytest.raises(ValueError, match="rows: .*singing"):
        evaluate(model, processor, questions, count=3, seed=0, rows=[("singing", "en")])


def test_loss_curves(trained: Path, tmp_path: Path) -> None:
    draw_losses([trained / stage.name for stage in SHORT], tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.width > 3 * picture.height  # one panel for each stage, side by side
    with pytest.raises(FileNotFoundError, match="log.jsonl: no such file; a training run leaves it"):
        draw_losses([tmp_path], tmp_path / "none.png")
    assert [path.name for path in tmp_path.iterdir()] == ["losses.png"]


def test_tokens_of_the_stages_are_the_tokenizers(trained: Path) -> None:
    files = {(trained / stage.name / "tokenizer.model").read_bytes() for stage in SHORT}
    assert len(files) == 1
    assert Tokenizer.from_file(trained / "stage3" / "tokenizer.model").encode("a fox") != []


def test_waves_make_neighbours_alike() -> None:
    rows = waves(torch.arange(1024) / 1024, 192)
    torch.testing.assert_close(rows.square().mean(1), torch.ones(1024))
    alike = rows[512] @ rows.T / 192
    assert alike.argmax() == 512
    assert alike[508:517].min() > 0.5 > alike[[312, 712]].max()
