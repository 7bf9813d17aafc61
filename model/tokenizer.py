"""PaliGemma's tokenizer: a sentencepiece model plus the location, segmentation and image tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import sentencepiece

from .added_tokens import IMAGE_TOKEN, LOC_TOKENS, SEG_TOKENS, AddedToken, Splitter, lone_surrogate
from .arguments import integer
from .files import json_bytes, write_atomically
from .token_files import read_token_files

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class StreamDecoder:
    """Turns token ids, one at a time, into the text that each adds.

    A character spelled by byte-fallback tokens is held back until its last byte, so that every piece is valid text. The pieces
    joined are `Tokenizer.decode` of the same ids (unless the bytes are not valid UTF-8).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending = b""
        self._ended = False

    def push(self, token_id: int) -> str:
        """Return the text that one more token completes; "" from the end token onwards."""
        token_id = integer("ids", token_id)
        if token_id == self._tokenizer.eos_id:
            text = self.finish()
            self._ended = True
            return text
        if self._ended:
            return ""
        piece = self._tokenizer.piece(token_id)
        if piece is None:
            return ""
        if isinstance(piece, str):
            return self.finish() + piece
        self._pending += piece
        complete = _complete_utf8_length(self._pending)
        text, self._pending = _decode_bytes(self._pending[:complete]), self._pending[complete:]
        return text

    def finish(self) -> str:
        """Return the text still held back: one replacement character for each byte of an unfinished character."""
        text, self._pending = _decode_bytes(self._pending), b""
        return text


class Tokenizer:
    """Text to ids and back, with the ids of transformers' PaliGemmaProcessor on the same file.

    Sentencepiece encodes the text between added tokens, as in the original code. transformers 5 rebuilds the model as a BPE. It
    splits two kinds of text differently: runs of spaces longer than the longest piece of spaces (31 in the released vocabulary),
    and several "▁" (U+2581) in a row.

    Args:
        model_proto: content of a sentencepiece `tokenizer.model`.
        folder: checkpoint folder whose files add tokens to the model, or name pieces that text must be split around.
        image_token_id: id of `<image>`, if the checkpoint's configuration defines it.
        name: the model's name in errors (its path).

    `<locNNNN>`, `<segNNN>` and `<image>` keep their ids in the model or in the folder. Missing tokens are appended: locations,
    segmentation codes, image, as in the released vocabulary (256000, 257024, 257152). If `image_token_id` lies in that range,
    locations and codes follow it, as in transformers.

    Raises:
        ValueError: the bytes are not a sentencepiece model, a control piece is missing, two tokens have one id, or a file of
            `folder` cannot be parsed or contradicts another file.
    """

    def __init__(
        self,
        model_proto: bytes,
        *,
        folder: Path | None = None,
        image_token_id: int | None = None,
        name: str = "tokenizer.model",
    ) -> None:
        self.model_proto = model_proto
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            loaded = self._model.LoadFromSerializedProto(model_proto)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name}: not a sentencepiece model ({error})") from error
        if not loaded:
            raise ValueError(f"{name}: not a sentencepiece model")
        try:
            self._pieces: list[str] = self._model.id_to_piece(list(range(self._model.get_piece_size())))
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not a sentencepiece model; a piece is no text ({error})") from error
        self.unk_id = self._model.unk_id()

        self.added_tokens: dict[str, AddedToken] = {}
        roles: dict[str, str] = {}
        if folder is not None:
            self.added_tokens, roles = read_token_files(folder, self._pieces, image_token_id)
        self.pad_id = self._control_id("<pad>", roles.get("pad_token"), self._model.pad_id(), name)
        self.eos_id = self._control_id("<eos>", roles.get("eos_token"), self._model.eos_id(), name)
        self.bos_id = self._control_id("<bos>", roles.get("bos_token"), self._model.bos_id(), name)
        self._add_control_pieces()
        self._add_paligemma_tokens(image_token_id)
        self.image_token_id = self.added_tokens[IMAGE_TOKEN].token_id
        self._added_text = self._invert_added_tokens(name)
        self._special_ids = {token.token_id for token in self.added_tokens.values() if token.special}
        self._splitter = Splitter(self.added_tokens)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, image_token_id: int | None = None) -> Tokenizer:
        """Read a single sentencepiece file.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is not a sentencepiece model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a sentencepiece model (tokenizer.model) is needed")
        return cls(path.read_bytes(), image_token_id=image_token_id, name=str(path))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, image_token_id: int | None = None) -> Tokenizer:
        """Read `tokenizer.model` and the files in which transformers stores added tokens.

        These are `tokenizer_config.json`, `tokenizer.json`, `added_tokens.json` and `special_tokens_map.json`, if they exist.

        Raises:
            FileNotFoundError: the folder has no `tokenizer.model`.
            ValueError: a file cannot be parsed, or two files disagree.
        """
        folder = Path(folder)
        path = folder / "tokenizer.model"
        if not path.is_file():
            found = " (tokenizer.json is there, but cannot stand in for it)" * (folder / "tokenizer.json").is_file()
            raise FileNotFoundError(
                f"{folder}: tokenizer.model is missing{found}; copy the original checkpoint's sentencepiece file there"
            )
        return cls(path.read_bytes(), folder=folder, image_token_id=image_token_id, name=str(path))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.model` and a `tokenizer_config.json` that transformers reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "tokenizer.model", self.model_proto)
        added = sorted(self.added_tokens.items(), key=lambda item: item[1].token_id)
        flags = {
            text: {name: value for name, value in asdict(token).items() if name != "token_id"} for text, token in added
        }
        config = {
            "tokenizer_class": "GemmaTokenizer",
            "processor_class": "PaliGemmaProcessor",
            "bos_token": self._text(self.bos_id),
            "eos_token": self._text(self.eos_id),
            "pad_token": self._text(self.pad_id),
            "unk_token": self._text(self.unk_id),
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {str(token.token_id): {"content": text, **flags[text]} for text, token in added},
        }
        write_atomically(folder / "tokenizer_config.json", json_bytes(config))

    def __len__(self) -> int:
        """The largest id plus one."""
        return max(len(self._pieces), max(self._added_text) + 1)

    @property
    def largest_text_id(self) -> int:
        """The largest id of all tokens but `<image>`, whose id may lie outside the model's embedding."""
        added = (token.token_id for text, token in self.added_tokens.items() if text != IMAGE_TOKEN)
        return max(len(self._pieces) - 1, *added)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS and EOS. Each added token is exactly one id.

        Raises:
            ValueError: the text holds half of a surrogate pair, which UTF-8 cannot encode.
        """
        if surrogate := lone_surrogate(text):
            raise ValueError(f"text: it holds {surrogate}, half of a surrogate pair, which is no character")
        ids: list[int] = []
        for part in self._splitter.split(text):
            ids += self._model.encode(part) if isinstance(part, str) else [part.token_id]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text before the first EOS; special tokens and ids outside the vocabulary are left out.

        White space is kept, and bytes that are not UTF-8 give one replacement character each, as in transformers'
        `decode(skip_special_tokens=True)`.

        Raises:
            TypeError: ids that are not a row of integers.
        """
        if not isinstance(ids, Iterable) or isinstance(ids, str):
            raise TypeError(f"ids: a row of token ids is expected, got {type(ids).__name__}")
        parts: list[str] = []
        pending = b""
        for token_id in ids:
            token_id = integer("ids", token_id)
            if token_id == self.eos_id:
                break
            piece = self.piece(token_id)
            if isinstance(piece, bytes):
                pending += piece
            elif piece is not None:
                parts += [_decode_bytes(pending), piece]
                pending = b""
        return "".join([*parts, _decode_bytes(pending)])

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder for ids that come one at a time."""
        return StreamDecoder(self)

    def piece(self, token_id: int) -> str | bytes | None:
        """Return what one id adds to decoded text: text, one byte of UTF-8, or None for nothing."""
        if token_id in self._special_ids or (
            token_id not in self._added_text and not 0 <= token_id < len(self._pieces)
        ):
            return None
        text = self._text(token_id)
        return bytes([int(text[3:-1], 16)]) if _BYTE.fullmatch(text) else text.replace("▁", " ")

    def _piece_id(self, piece: str) -> int | None:
        token_id = self._model.piece_to_id(piece)
        return token_id if self._pieces[token_id] == piece else None

    def _text(self, token_id: int) -> str:
        return self._added_text.get(token_id) or self._pieces[token_id]

    def _control_id(self, piece: str, named: str | None, declared: int, name: str) -> int:
        if named is not None:
            return self.added_tokens[named].token_id
        token_id = declared if declared >= 0 else self._piece_id(piece)
        if token_id is None:
            raise ValueError(f"{name}: the sentencepiece model has no {piece} piece")
        return token_id

    def _add_control_pieces(self) -> None:
        # transformers splits text around control pieces; sentencepiece alone would encode "<bos>" as characters.
        for token_id in range(len(self._pieces)):
            if self._model.is_control(token_id) or self._model.is_unknown(token_id):
                self.added_tokens.setdefault(self._pieces[token_id], AddedToken(token_id, special=True))
        mask_id = self._piece_id("<mask>")
        if mask_id is not None:
            self.added_tokens.setdefault("<mask>", AddedToken(mask_id, special=True))

    def _add_paligemma_tokens(self, image_token_id: int | None) -> None:
        missing = []
        for text in LOC_TOKENS + SEG_TOKENS:
            token_id = self._piece_id(text)
            if token_id is not None:
                self.added_tokens.setdefault(text, AddedToken(token_id, special=False))
            elif text not in self.added_tokens:
                missing.append(text)
        if image_token_id is None:
            image_token_id = self._piece_id(IMAGE_TOKEN)
        if image_token_id is None and IMAGE_TOKEN in self.added_tokens:
            image_token_id = self.added_tokens[IMAGE_TOKEN].token_id
        taken = {token.token_id for token in self.added_tokens.values()}
        first = max([len(self._pieces), *(token_id + 1 for token_id in taken)])
        if image_token_id is not None and first <= image_token_id < first + len(missing):
            first = image_token_id + 1
        for offset, text in enumerate(missing):
            self.added_tokens[text] = AddedToken(first + offset, special=False, normalized=True)
        if image_token_id is None:
            image_token_id = first + len(missing)
        known = self.added_tokens.get(IMAGE_TOKEN, AddedToken(image_token_id, special=True))
        self.added_tokens[IMAGE_TOKEN] = replace(known, token_id=image_token_id, special=True)

    def _invert_added_tokens(self, name: str) -> dict[int, str]:
        by_id: dict[int, str] = {}
        for text, token in self.added_tokens.items():
            other = by_id.setdefault(token.token_id, text)
            if other != text:
                raise ValueError(f"{name}: id {token.token_id} belongs to both {other!r} and {text!r}")
        return by_id


def _complete_utf8_length(data: bytes) -> int:
    """Return the length of `data` without an unfinished character at its end."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            width = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if width > back else len(data)
        if byte < 0x80:
            break
    return len(data)


def _decode_bytes(data: bytes) -> str:
    # transformers' ByteFallback decoder: a run of bytes is valid as a whole, or every byte is replaced.
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "\N{REPLACEMENT CHARACTER}" * len(data)
