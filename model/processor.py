"""The processor: images and prompts to a model's inputs, tokens to text, boxes and masks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .added_tokens import LOC_TOKENS, SEG_TOKENS, lone_surrogate
from .arguments import integer
from .checkpoints.hub import local_path
from .choices import GRAMMARS, RESIZE_MODES
from .config import PaliGemmaConfig
from .files import json_bytes, write_atomically
from .grammar import TokenGrammar
from .images import ImageInput, load_image, normalization_table, read_image_config, resized_pixels
from .inputs import Inputs
from .locations import Detection, draw, object_score, parse, parse_places
from .segmentation import CODES_PER_MASK, MaskVQVAE
from .tokenizer import IMAGE_TOKEN, StreamDecoder, Tokenizer

MASK_DECODER = "vae-oid.npz"
"""File name of a checkpoint folder's mask decoder."""

IGNORE_INDEX = -100


class Processor:
    """Turn images and prompts into a model's inputs, and a model's tokens into text and objects.

    Args:
        tokenizer: encodes and decodes text.
        image_size: side of the square that images are resized to, in pixels.
        num_image_tokens: placeholders per image.
        image_token_id: id of the placeholder; default: the tokenizer's.
        max_position_embeddings: the model's longest sequence, image tokens included.
        resize: how images become squares. "hf" resamples 8-bit images with Pillow (bicubic, antialias), as transformers does.
            "big_vision" is bilinear with antialias in float, as in the original code's inference and its VQA and OCR training.
            "big_vision_no_antialias" was used in training on COCO captions, TextCaps, SciCap, RefCOCO and GQA.
        resample: Pillow's filter for "hf".
        image_mean, image_std: one number per channel for "hf", applied after scaling to [0, 1].
        mask_decoder: turns segmentation codes into masks; without it, parsed objects have no masks.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        num_image_tokens: int,
        image_token_id: int | None = None,
        max_position_embeddings: int = 8192,
        resize: str = "hf",
        resample: int = Image.Resampling.BICUBIC,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        mask_decoder: MaskVQVAE | None = None,
    ) -> None:
        if resize not in RESIZE_MODES:
            raise ValueError(f"resize: {resize!r}; allowed are {', '.join(map(repr, RESIZE_MODES))}")
        for argument, value in (("image_size", image_size), ("num_image_tokens", num_image_tokens)):
            if integer(argument, value) < 1:
                raise ValueError(f"{argument}: {value}; it must be at least 1")
        if len(image_mean) != 3 or len(image_std) != 3:
            raise ValueError(f"image_mean and image_std: 3 numbers each, got {image_mean} and {image_std}")
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.num_image_tokens = num_image_tokens
        self.image_token_id = tokenizer.image_token_id if image_token_id is None else image_token_id
        self.max_position_embeddings = max_position_embeddings
        self.resize = resize
        self.resample = Image.Resampling(resample)
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.mask_decoder = mask_decoder
        self.location_ids = {tokenizer.added_tokens[text].token_id for text in LOC_TOKENS}
        self._normalized = normalization_table(self.image_mean, self.image_std)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        resize: str = "hf",
        mask_decoder: MaskVQVAE | str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Processor:
        """Build the processor of a checkpoint folder, or of a repository on the hub.

        Read `tokenizer.model` and `config.json`, and if they exist `tokenizer_config.json`, `added_tokens.json`,
        `preprocessor_config.json` or `processor_config.json`, and the mask decoder, `vae-oid.npz` (`mask_decoder`: another
        one, or its path). For `revision`, `token`, `cache_dir` and `local_files_only` see
        `pg_kernels.model.checkpoints.hub.local_path`.

        Raises:
            FileNotFoundError: a required file is missing.
            ValueError: a file cannot be parsed, or two files disagree.
        """
        folder = local_path(
            folder,
            weights=False,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise FileNotFoundError(f"{config_path}: missing; it says the image size and the image token")
        config = PaliGemmaConfig.from_file(config_path)
        tokenizer = Tokenizer.from_pretrained(folder, image_token_id=config.image_token_id)
        vocabulary = config.text_config.vocab_size
        if tokenizer.largest_text_id >= vocabulary:
            raise ValueError(
                f"{folder}: its tokenizer has ids up to {tokenizer.largest_text_id}, but {config_path} has vocab_size "
                f"{vocabulary}; a model with added tokens needs a larger embedding"
            )
        image_path, image_config = read_image_config(folder)
        size = config.vision_config.image_size
        declared = image_config.get("size", size)
        if declared not in (size, {"height": size, "width": size}):
            raise ValueError(f"{image_path}: size {declared}, but {config_path} has image_size {size}")
        if mask_decoder is None and (folder / MASK_DECODER).is_file():
            mask_decoder = folder / MASK_DECODER
        if mask_decoder is not None and not isinstance(mask_decoder, MaskVQVAE):
            mask_decoder = MaskVQVAE.from_file(mask_decoder)
        return cls(
            tokenizer,
            image_size=size,
            num_image_tokens=config.vision_config.num_image_tokens,
            image_token_id=config.image_token_id,
            max_position_embeddings=config.text_config.max_position_embeddings,
            resize=resize,
            resample=image_config.get("resample", Image.Resampling.BICUBIC),
            image_mean=image_config.get("image_mean", (0.5, 0.5, 0.5)),
            image_std=image_config.get("image_std", (0.5, 0.5, 0.5)),
            mask_decoder=mask_decoder,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.model`, `tokenizer_config.json`, `preprocessor_config.json`, and the mask decoder to `vae-oid.npz`.

        Beside the model's `config.json`, both this class and transformers' `AutoProcessor` read them.
        """
        self.tokenizer.save_pretrained(folder)
        content = {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "PaliGemmaProcessor",
            "image_seq_length": self.num_image_tokens,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": int(self.resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }
        write_atomically(Path(folder) / "preprocessor_config.json", json_bytes(content))
        if self.mask_decoder is not None:
            self.mask_decoder.save(Path(folder) / MASK_DECODER)

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]],
        prompts: str | Sequence[str],
        suffixes: str | Sequence[str] | None = None,
        *,
        padding_side: str = "left",
    ) -> Inputs:
        """Make the inputs of a model: `<image>` placeholders, BOS, prompt, newline, and for training suffix and EOS.

        Args:
            images: one image, one for each prompt, or a list of images for each prompt. An image is a PIL image, an
                array or tensor (HWC, HW, or CHW for tensors; uint8, or float in [0, 1]), or a path (whose EXIF
                orientation is applied). Transparency is blended onto white.
            prompts: one prompt or a batch. A prompt with `<image>` in it places its images itself.
            suffixes: the answers to train on, one for each prompt.
            padding_side: "left" (for generation) or "right".

        Returns:
            A dict whose `to` moves it to a device: `input_ids`, `attention_mask`, `token_type_ids` (1 on the suffix), each int64
            [B, S]; `pixel_values` fp32 [images, 3, H, W]; with suffixes `labels` int64 [B, S], -100 outside the suffix.

        Raises:
            ValueError: counts of images, prompts or suffixes differ, a sequence is too long, or an image is too large.
            TypeError: an image or a text of another type.
            FileNotFoundError, OSError: an image file is missing, not an image, or truncated.
        """
        prompts = _as_texts("prompts", prompts)
        if not prompts:
            raise ValueError("prompts: none given; at least one is needed")
        flat_images, counts = _images_per_prompt(images, prompts)
        inputs = self.encode(prompts, counts, suffixes, padding_side=padding_side)
        inputs["pixel_values"] = self.preprocess_images(flat_images)
        return inputs

    def encode(
        self,
        prompts: Sequence[str],
        num_images: Sequence[int],
        suffixes: str | Sequence[str] | None = None,
        *,
        padding_side: str = "left",
    ) -> Inputs:
        """Make a model's inputs without `pixel_values`, as `__call__` does for `num_images` images of each prompt.

        Raises:
            ValueError, TypeError: as `__call__`.
        """
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side: {padding_side!r}; allowed are 'left' and 'right'")
        prefixes = [self._prefix(prompt, count) for prompt, count in zip(prompts, num_images)]
        answers: list[list[int]] = [[] for _ in prompts]
        if suffixes is not None:
            suffixes = _as_texts("suffixes", suffixes)
            if len(suffixes) != len(prompts):
                raise ValueError(f"suffixes: {len(suffixes)} for {len(prompts)} prompts; each prompt needs one")
            answers = [self._suffix(suffix) for suffix in suffixes]
        for index, (prefix, answer) in enumerate(zip(prefixes, answers)):
            self._check_length(index, prefix, answer)
        inputs = self._pad(prefixes, answers, padding_side)
        if suffixes is not None:
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, IGNORE_INDEX)
        return inputs

    def preprocess_images(self, images: Iterable[ImageInput]) -> torch.Tensor:
        """Resize and normalise images.

        Returns:
            fp32 [n, 3, H, W], in [-1, 1] for the released models.

        Raises:
            As `__call__`.
        """
        pixels = [
            resized_pixels(load_image(image), self.image_size, self.resize, self.resample, self._normalized)
            for image in images
        ]
        return torch.stack(pixels) if pixels else torch.empty(0, 3, self.image_size, self.image_size)

    def decode(self, ids: torch.Tensor | np.ndarray | Sequence[int] | Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of ids [B, T] (or of the one row [T]), up to its first EOS.

        Special tokens are left out; `<loc>`, `<seg>` and white space are kept, as in transformers'
        `batch_decode(skip_special_tokens=True)`. Other tokens that end an answer (`generate`'s `eos_token_id`) are text
        unless they are special.

        Raises:
            TypeError: ids that are not integers or rows of integers.
        """
        if not isinstance(ids, (torch.Tensor, np.ndarray, Sequence)):
            raise TypeError(f"ids: rows of token ids are expected, got {type(ids).__name__}")
        rows: list = ids.tolist() if isinstance(ids, (torch.Tensor, np.ndarray)) else list(ids)
        if not rows or not isinstance(rows[0], (list, tuple, torch.Tensor, np.ndarray)):
            rows = [rows]
        return [self.tokenizer.decode(row) for row in rows]

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder for one sequence: `push(id)` returns the text that an id completes, `finish()` the rest."""
        return self.tokenizer.stream_decoder()

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of one sequence piece by piece, never half a character."""
        decoder = self.stream_decoder()
        for token_id in ids:
            if text := decoder.push(token_id):
                yield text
        if text := decoder.finish():
            yield text

    def parse(self, text: str, size: tuple[int, int]) -> list[Detection]:
        """Return the objects of an answer, in pixels of an image of `size` (width, height)."""
        return parse(text, size, mask_decoder=self.mask_decoder)

    def parse_answer(
        self, ids: torch.Tensor | Sequence[int], size: tuple[int, int], scores: torch.Tensor | Sequence[float]
    ) -> list[Detection]:
        """Return the objects of one answer with their scores.

        Args:
            ids: the answer's tokens [T].
            size: width and height of the image in pixels.
            scores: the tokens' log-probabilities [T], as `generate(return_scores=True)` returns them.

        Returns:
            The objects of `parse`. An object's score is `object_score` of its four locations' probabilities.
        """
        tokens, log_probs = [int(token_id) for token_id in ids], [float(score) for score in scores]
        if len(tokens) != len(log_probs):
            raise ValueError(f"scores: {len(log_probs)} for {len(tokens)} tokens; each token needs one")
        decoder, text, starts = self.stream_decoder(), "", {}
        for index, token_id in enumerate(tokens):
            text += decoder.push(token_id)
            if token_id in self.location_ids:
                starts[len(text) - len(LOC_TOKENS[0])] = index
        objects = []
        for place, found in parse_places(text + decoder.finish(), size, mask_decoder=self.mask_decoder):
            probabilities = map(math.exp, log_probs[starts[place] : starts[place] + 4])
            objects.append(replace(found, score=object_score(probabilities)))
        return objects

    def grammar(self, kind: str) -> TokenGrammar:
        """Return the grammar of answers to "detect …" or "segment …", for `generate(grammar=…)`.

        Args:
            kind: "detect" allows objects of a box and a label, "segment" objects of a box, a mask and a label. Both allow an
                answer without objects.

        Raises:
            ValueError: another kind.
        """
        if kind not in GRAMMARS:
            raise ValueError(f"grammar: {kind!r}; allowed are {', '.join(map(repr, GRAMMARS))}")
        added = self.tokenizer.added_tokens
        locations, codes = (
            torch.tensor([added[text].token_id for text in texts]) for texts in (LOC_TOKENS, SEG_TOKENS)
        )
        labels = [token_id for token_id in range(self.tokenizer.largest_text_id + 1) if self._is_label(token_id)]
        return TokenGrammar(locations, codes, torch.tensor(labels), CODES_PER_MASK if kind == "segment" else 0)

    def _is_label(self, token_id: int) -> bool:
        """Return whether a token is text, or a byte of text, without the marks of tokens."""
        piece = self.tokenizer.piece(token_id)
        if isinstance(piece, bytes):
            return piece not in (b"<", b">")
        return piece is not None and not {"<", ">"} & set(piece)

    def stop_at(self, *texts: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function for `generate(stop=…)` that ends an answer once it contains one of the texts.

        It decodes the answers after each step, on the host.
        """
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"stop_at: expected texts that are not empty, got {texts}")

        def stop(answers: torch.Tensor) -> torch.Tensor:
            decoded = self.decode(answers)
            return torch.tensor([any(text in answer for text in texts) for answer in decoded], device=answers.device)

        return stop

    def draw(self, image: ImageInput, objects: Sequence[Detection]) -> Image.Image:
        """Return a copy of the image with the objects' outlines, labels and masks drawn on it."""
        return draw(load_image(image), objects)

    def _prefix(self, prompt: str, num_images: int) -> list[int]:
        split = prompt.rfind(IMAGE_TOKEN) + len(IMAGE_TOKEN) if IMAGE_TOKEN in prompt else 0
        head = self.tokenizer.encode(prompt[:split]) if split else [self.tokenizer.image_token_id] * num_images
        ids: list[int] = []
        for token_id in head:
            is_image = token_id == self.tokenizer.image_token_id
            ids += [self.image_token_id] * self.num_image_tokens if is_image else [token_id]
        return [*ids, self.tokenizer.bos_id, *self.tokenizer.encode(prompt[split:] + "\n")]

    def _suffix(self, suffix: str) -> list[int]:
        if IMAGE_TOKEN in suffix:
            raise ValueError(f"suffixes: {IMAGE_TOKEN} can stand in a prompt only, got {suffix!r}")
        return [*self.tokenizer.encode(suffix), self.tokenizer.eos_id]

    def _check_length(self, index: int, prefix: list[int], answer: list[int]) -> None:
        length = len(prefix) + len(answer)
        if length > self.max_position_embeddings:
            image_tokens = prefix.count(self.image_token_id)
            raise ValueError(
                f"prompts[{index}]: {image_tokens} image tokens and {length - image_tokens} text tokens make {length}; "
                f"the model takes at most {self.max_position_embeddings}"
            )

    def _pad(self, prefixes: list[list[int]], answers: list[list[int]], side: str) -> Inputs:
        lengths = [len(prefix) + len(answer) for prefix, answer in zip(prefixes, answers)]
        shape = (len(prefixes), max(lengths))
        input_ids = torch.full(shape, self.tokenizer.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        token_type_ids = torch.zeros(shape, dtype=torch.int64)
        for row, (prefix, answer) in enumerate(zip(prefixes, answers)):
            start = shape[1] - lengths[row] if side == "left" else 0
            end = start + lengths[row]
            input_ids[row, start:end] = torch.tensor(prefix + answer)
            attention_mask[row, start:end] = 1
            token_type_ids[row, start + len(prefix) : end] = 1
        return Inputs(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)


def _as_texts(argument: str, texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{argument}: a string or a list of strings is expected, got {type(texts).__name__}")
    for index, text in enumerate(texts):
        if surrogate := lone_surrogate(text):
            raise ValueError(
                f"{argument}[{index}]: it holds {surrogate}, half of a surrogate pair, which is no character"
            )
    return list(texts)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _images_per_prompt(
    images: ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]], prompts: list[str]
) -> tuple[list[ImageInput], list[int]]:
    """Return the flat list of images, and the number of images of each prompt."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = list(images)
    groups: list = list(images) if isinstance(images, (list, tuple)) else [images]
    nested = any(_is_list(group) for group in groups)
    if nested and not all(_is_list(group) for group in groups):
        raise TypeError("images: a list holds either images or lists of images, not both")
    flat = [image for group in groups for image in group] if nested else groups
    if not flat:
        raise ValueError("images: none given; a prompt needs at least one")
    placeholders = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
    if any(placeholders) and not nested:
        if sum(placeholders) != len(flat):
            raise ValueError(f"prompts: {sum(placeholders)} {IMAGE_TOKEN} in them, but {len(flat)} images are given")
        return flat, placeholders
    if len(groups) != len(prompts):
        hint = "; several images of one prompt go into a list of their own: [[a, b]]" * (len(prompts) == 1)
        raise ValueError(f"images: {len(groups)} for {len(prompts)} prompts{hint}")
    counts = [len(group) for group in groups] if nested else [1] * len(groups)
    if any(placeholders):
        for index, (written, given) in enumerate(zip(placeholders, counts)):
            if written != given:
                raise ValueError(f"prompts[{index}]: {written} {IMAGE_TOKEN} in it, but {given} images are given")
    return flat, counts
