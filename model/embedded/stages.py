"""The stages in which the built-in model is trained: towers alone, jointly, at a higher resolution, for the tasks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..config import PaliGemmaConfig, TextConfig, VisionConfig
from ..paligemma import PaliGemma
from ..processor import Processor
from ..segmentation import MaskVQVAE
from ..tokenizer import LOC_TOKENS, Tokenizer
from ..training.loading import Batch, micro_batch_size
from ..training.recipe import Recipe
from ..training.trainer import suffix_loss, train
from .tasks import CHARACTERS, LANGUAGES, WRITING, Exercise, Questions, unique_images
from .vocabulary import train_tokenizer
from .world import World

VISION = VisionConfig(
    hidden_size=192, intermediate_size=384, num_hidden_layers=6, num_attention_heads=3, image_size=112, patch_size=14
)
TEXT = TextConfig(
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=1024,
)

_READING = 0.75
"""The share of a reading stage's pictures that show writing."""
_COMPARISONS = 12
"""Every so many batches, one has two images for each question: in one batch with others, padding would double these."""


@dataclass(frozen=True)
class TrainingStage:
    """One part of the training: a folder's name, the sides of pictures and patches in pixels, the trainer's recipe.

    One for `reading` shows more writing, at first random letters and digits, later mostly words and numbers.
    """

    name: str
    image_size: int
    patch_size: int
    recipe: Recipe
    unimodal: bool = False
    reading: bool = False


_COMMON = Recipe(
    steps=1,
    batch_size=128,
    micro_batch=64,
    optimizer="muon",
    betas=(0.9, 0.99),
    weight_decay=0.01,
    schedule="rsqrt",
    precision="bfloat16",
    save_every=100,
)

STAGES = (
    TrainingStage("stage0", 112, 14, replace(_COMMON, steps=1000, learning_rate=1.5e-3), unimodal=True),
    TrainingStage("stage1", 112, 14, replace(_COMMON, steps=4000, learning_rate=2e-3)),
    # Words alone teach no reading: where a letter stands and which it is would have to be found at once.
    TrainingStage(
        "stage2-reading", 224, 28, replace(_COMMON, steps=1600, learning_rate=1.5e-3, warmup=0.2), reading=True
    ),
    TrainingStage("stage2", 224, 28, replace(_COMMON, steps=2800, learning_rate=1.5e-3, warmup=0.1)),
    TrainingStage("stage3", 224, 28, replace(_COMMON, steps=3100, learning_rate=6e-4, schedule="linear", warmup=0.01)),
)


class Generated(Dataset[Batch]):
    """Batches drawn from a world as they are needed, each a function of the seed and its index alone, read once in order."""

    shuffle = False

    def __init__(self, questions: Questions, processor: Processor, stage: TrainingStage) -> None:
        self.questions, self.processor, self.stage = questions, processor, stage
        self.fingerprint = stage.name

    def __len__(self) -> int:
        return (self.stage.recipe.steps or 0) * (self.stage.recipe.batch_size // self.size)

    @property
    def size(self) -> int:
        """The number of questions in a batch, which is the trainer's micro batch."""
        return micro_batch_size(self.stage.recipe)

    def __getitem__(self, index: int) -> Batch:
        rng = random.Random(f"{self.stage.name} {self.stage.recipe.seed} {index}")
        if self.stage.unimodal:
            return self._pairs(rng)
        compare = index % _COMPARISONS == _COMPARISONS - 1
        return collate(self.examples(rng, compare=compare, done=index / len(self)), self.processor)

    def examples(self, rng: random.Random, *, compare: bool, done: float = 1.0) -> list[Exercise]:
        """Draw a batch of questions, or half as many that compare two images. `done` is the finished share of the stage."""
        characters = max(CHARACTERS, 1 - done) if self.stage.reading else CHARACTERS
        draw: Callable[[random.Random, int], list[Exercise]] = partial(
            self.questions.about_one, writing=_READING if self.stage.reading else WRITING, characters=characters
        )
        count = self.size
        if compare:
            draw, count = partial(self.questions.compare, most=2), count // 2
        examples: list[Exercise] = []
        while len(examples) < count:
            examples += draw(rng, self.processor.image_size)
        return examples[:count]

    def _pairs(self, rng: random.Random) -> Batch:
        """Draw pictures with their captions, for a contrastive loss, and texts without pictures."""
        questions, size = self.questions, self.processor.image_size
        pictures = [questions.world.scene(rng, size) for _ in range(self.size)]
        captions = [questions.caption(picture, "en") for picture in pictures]
        texts = [questions.caption(picture, _language(rng)) for picture in pictures]
        inputs = self.processor.encode(
            [text.prefix for text in texts],
            [0] * len(texts),
            [text.suffix for text in texts],
            padding_side="right",
        )
        encode = self.processor.tokenizer.encode
        words = [torch.tensor(encode(text.suffix)) for text in captions]
        return {
            **inputs,
            "pixel_values": self.processor.preprocess_images([picture.image for picture in pictures]),
            "caption_ids": nn.utils.rnn.pad_sequence(words, batch_first=True, padding_value=0),
        }


def collate(examples: list[Exercise], processor: Processor) -> Batch:
    """Make a batch for `suffix_loss` of examples with the same number of images; each distinct image is encoded once.

    Examples of equal lengths are adjacent: on a CPU, attention computes them together.
    """
    images, index = unique_images(examples)
    inputs = processor.encode(
        [example.prefix for example in examples],
        [len(example.images) for example in examples],
        [example.suffix for example in examples],
        padding_side="right",
    )
    lengths = inputs["attention_mask"].sum(1) * inputs["attention_mask"].shape[1] + inputs["token_type_ids"].sum(1)
    order = lengths.argsort(stable=True)
    return {
        **{name: tensor[order] for name, tensor in inputs.items()},
        "pixel_values": processor.preprocess_images(images),
        "image_index": torch.from_numpy(index).unflatten(0, (len(examples), -1))[order].flatten(),
    }


class Unimodal(nn.Module):
    """TrainingStage 0's two losses: the image encoder's against captions, and the decoder's on text alone.

    The heads that compare picture and caption (attention pooling, a bag of words) are not kept.
    Source: Zhai et al., https://arxiv.org/abs/2303.15343.
    """

    def __init__(self, model: PaliGemma) -> None:
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.attend = nn.Linear(width, 1)
        self.image_head = nn.Linear(width, width)
        self.words = nn.Embedding(model.config.text_config.vocab_size, width)
        self.text_head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.bias = nn.Parameter(torch.tensor([-10.0]))

    def forward(self, pixel_values: Tensor, caption_ids: Tensor, **text: Any) -> Tensor:
        """Return the sum of both losses, for pictures [B, 3, H, W] with captions [B, W], 0 where padded."""
        features = self.model.model.vision_tower(pixel_values)
        pooled = (self.attend(features).softmax(1) * features).sum(1)
        known = (caption_ids != 0)[..., None]
        words = (self.words(caption_ids) * known).sum(1) / known.sum(1)
        image, caption = self.image_head(pooled).float(), self.text_head(words).float()
        scores = F.normalize(image, dim=1) @ F.normalize(caption, dim=1).T * self.scale.exp() + self.bias
        same = (caption_ids[:, None] == caption_ids[None]).all(-1)
        contrastive = -F.logsigmoid(torch.where(same, scores, -scores)).sum() / len(scores)
        language = self.model(**text, loss_reduction="example").loss
        return contrastive + language


def unimodal_loss(model: nn.Module, batch: Batch, recipe: Recipe) -> Tensor:
    """The loss of `Unimodal` on a batch of pairs."""
    return model(**batch)


def train_stages(
    folder: str | Path,
    world: World,
    codec: MaskVQVAE,
    *,
    seed: int = 0,
    stages: tuple[TrainingStage, ...] = STAGES,
    start: Path | None = None,
    workers: int = 1,
) -> None:
    """Run all stages, each in its own subfolder. Finished stages are not repeated.

    Each stage starts from the weights of the previous one, the first from those of `start`, if given. A stage leaves a Hugging
    Face folder and its `log.jsonl`. Raises ModuleNotFoundError without the `train` extra, OSError when a folder cannot be
    written.
    """
    folder = Path(folder)
    questions = Questions(world, codec)
    before = start
    for stage in stages:
        target = folder / stage.name
        stage = replace(stage, recipe=replace(stage.recipe, seed=seed, workers=workers))
        if not (target / "model.safetensors").is_file():
            _train_stage(stage, before, target, questions)
        before = target


def _train_stage(stage: TrainingStage, before: Path | None, target: Path, questions: Questions) -> None:
    target.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(stage.recipe.seed)
    if before is None:
        tokenizer = new_tokenizer(target)
        model = PaliGemma(small_config(tokenizer, stage.image_size, stage.patch_size))
        order_embeddings(model, tokenizer)
    else:
        tokenizer = Tokenizer.from_file(before / "tokenizer.model")
        model = with_resolution(PaliGemma.from_pretrained(before, dtype=torch.float32), stage)
    processor = Processor(
        tokenizer,
        image_size=stage.image_size,
        num_image_tokens=model.config.vision_config.num_image_tokens,
        max_position_embeddings=model.config.text_config.max_position_embeddings,
        mask_decoder=questions.codec,
    )

    def save() -> None:
        processor.save_pretrained(target)
        model.save_pretrained(target)

    train(
        Unimodal(model) if stage.unimodal else model,
        Generated(questions, processor, stage),
        stage.recipe,
        target,
        loss=unimodal_loss if stage.unimodal else suffix_loss,
        save=save,
    )


def new_tokenizer(folder: Path) -> Tokenizer:
    """Train the tokenizer and write it to a folder."""
    train_tokenizer(folder / "tokenizer.model")
    return Tokenizer.from_file(folder / "tokenizer.model")


def with_resolution(model: PaliGemma, stage: TrainingStage) -> PaliGemma:
    """Return the model with a stage's image and patch sizes. Patches are resized first, then positions are resampled.

    Patches twice as large, in images twice as large, start with the same features: each weight is divided over the pixels that
    its pixel became. A higher resolution therefore needs no more tokens.
    """
    vision = model.config.vision_config
    if stage.patch_size != vision.patch_size:
        state = model.state_dict()
        name = "model.vision_tower.embeddings.patch_embedding.weight"
        factor = stage.patch_size / vision.patch_size
        state[name] = F.interpolate(state[name], (stage.patch_size,) * 2, mode="nearest") / factor**2
        vision = replace(vision, patch_size=stage.patch_size, image_size=round(vision.image_size * factor))
        model = PaliGemma(replace(model.config, vision_config=vision))
        model.load_state_dict(state)
    if stage.image_size != vision.image_size:
        model.set_image_size(stage.image_size)
    return model


def small_config(tokenizer: Tokenizer, image_size: int, patch_size: int) -> PaliGemmaConfig:
    """Return the small model's configuration, with the vocabulary and ids of its tokenizer."""
    text = replace(TEXT, vocab_size=len(tokenizer))
    vision = replace(VISION, image_size=image_size, patch_size=patch_size)
    return PaliGemmaConfig(vision, text, image_token_id=tokenizer.image_token_id)


@torch.no_grad()
def order_embeddings(model: PaliGemma, tokenizer: Tokenizer) -> None:
    """Initialise neighbouring patches and neighbouring locations alike, so that positions are learnt early.

    Position embeddings start as sines and cosines of the patch's row and column, `<loc>` embeddings as those of the location.
    """
    table = model.model.vision_tower.embeddings.position_embedding.weight
    side = math.isqrt(len(table))
    along = waves(torch.arange(side) / side, table.shape[1] // 2)
    grid = torch.cat((along[:, None].expand(-1, side, -1), along[None].expand(side, -1, -1)), dim=-1)
    table.copy_(0.5 * grid.flatten(0, 1))
    embedding = model.model.language_model.embed_tokens.weight
    first = tokenizer.encode(LOC_TOKENS[0])[0]
    locations = waves(torch.arange(len(LOC_TOKENS)) / len(LOC_TOKENS), embedding.shape[1])
    embedding[first : first + len(LOC_TOKENS)] = locations * embedding.shape[1] ** -0.5


def waves(places: Tensor, width: int) -> Tensor:
    """Return sines and cosines [n, width] of places [n] in [0, 1), from half a turn to 32 turns along it; mean square 1."""
    turns = 0.5 * 64 ** torch.linspace(0, 1, width // 2)
    angles = 2 * math.pi * places[:, None] * turns
    return math.sqrt(2) * torch.cat((angles.sin(), angles.cos()), dim=1)


def _language(rng: random.Random) -> str:
    return LANGUAGES[int(rng.random() * len(LANGUAGES))]
