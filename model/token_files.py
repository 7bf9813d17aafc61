"""The files in which transformers stores tokens added to a sentencepiece model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .added_tokens import IMAGE_TOKEN, AddedToken, lone_surrogate
from .files import read_json_object

ROLES = ("bos_token", "eos_token", "pad_token")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LARGEST_ID = 2**31 - 1


def read_token_files(
    folder: Path, pieces: Sequence[str], image_token_id: int | None
) -> tuple[dict[str, AddedToken], dict[str, str]]:
    """Read the added tokens of a checkpoint folder from transformers' files.

    Ids are in `added_tokens_decoder` of tokenizer_config.json, `added_tokens` of tokenizer.json and added_tokens.json. Flags come
    from the first file that has the token. A special token that is only named (`eos_token`, `extra_special_tokens`, … of
    tokenizer_config.json or special_tokens_map.json) is a piece of the model, or gets the next free id.

    Args:
        folder: the folder of the files.
        pieces: the pieces of the folder's tokenizer.model, by id.
        image_token_id: config.json's id of the placeholder, which may differ from the id of a piece <image>.

    Returns:
        Tokens by text, and the texts of `ROLES` that are named.

    Raises:
        ValueError: a file cannot be read, a field has another type, or two files disagree. The message names them.
    """
    config, tokenizer, added, names = (
        (folder / name, read_json_object(folder / name) if (folder / name).is_file() else {})
        for name in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json", "special_tokens_map.json")
    )
    named = _named_tokens(config, names)
    tokens = _Tokens()
    for key, entry in _field(*config, "added_tokens_decoder", dict).items():
        token_id = int(key) if key.isdecimal() and len(key) <= len(str(_LARGEST_ID)) else key
        tokens.add(entry, token_id, config[0], f"added_tokens_decoder[{key!r}]")
    for index, entry in enumerate(_field(*tokenizer, "added_tokens", list)):
        token_id = entry.get("id") if isinstance(entry, dict) else None
        tokens.add(entry, token_id, tokenizer[0], f"added_tokens[{index}]")
    special = {text for _, _, text, _ in named}
    for text, token_id in added[1].items():
        tokens.add({"content": text, "special": text in special}, token_id, added[0], repr(text))
    ids = {piece: token_id for token_id, piece in enumerate(pieces)}
    for path, field, text, entry in named:
        if text not in tokens.by_text:
            following = max([len(pieces), *(token_id + 1 for token_id in tokens.texts)])
            token_id = ids.get(text, following) if image_token_id is None or text != IMAGE_TOKEN else image_token_id
            tokens.add(entry, token_id, path, field)
    if image_token_id is not None:
        image = {"content": IMAGE_TOKEN, "special": True}
        tokens.add(image, image_token_id, folder / "config.json", "image_token_index")
    _check_pieces(tokens, _field(*tokenizer, "model", dict), tokenizer[0], ids, pieces, folder / "tokenizer.model")
    roles = {field: text for _, field, text, _ in named if field in ROLES}
    for text in roles.values():
        tokens.by_text[text] = replace(tokens.by_text[text], special=True)
    return tokens.by_text, roles


class _Tokens:
    """Tokens by text and by id, and the file of each."""

    def __init__(self) -> None:
        self.by_text: dict[str, AddedToken] = {}
        self.texts: dict[int, str] = {}
        self.paths: dict[str, Path] = {}

    def add(self, entry: object, token_id: object, path: Path, field: str) -> None:
        """Check a token and add it. The id of an existing token must agree."""
        text, token = _token(entry, token_id, f"{path}: {field}")
        known = self.by_text.setdefault(text, token)
        first = self.paths.setdefault(text, path)
        if known.token_id != token.token_id:
            raise ValueError(f"{text!r} has the id {known.token_id} in {first}, but {token.token_id} in {path}")
        other = self.texts.setdefault(token.token_id, text)
        if other != text:
            raise ValueError(
                f"id {token.token_id} belongs to both {other!r} (in {self.paths[other]}) and {text!r} (in {path})"
            )


def _field(path: Path, content: dict[str, Any], name: str, kind: type) -> Any:
    value = content.get(name, kind())
    if not isinstance(value, kind):
        raise _unexpected(f"{path}: {name}", "an object" if kind is dict else "a list", value)
    return value


def _token(entry: object, token_id: object, where: str) -> tuple[str, AddedToken]:
    if not isinstance(entry, dict):
        raise _unexpected(where, "an object", entry)
    text = entry.get("content")
    if not isinstance(text, str) or not text or lone_surrogate(text):
        raise _unexpected(f"{where}: content", "a text", text)
    if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id <= _LARGEST_ID:
        raise _unexpected(f"{where}: id", f"an integer from 0 to {_LARGEST_ID}", token_id)
    flags = {flag: entry.get(flag, False) for flag in ("special", "lstrip", "rstrip", "single_word")}
    flags["normalized"] = entry.get("normalized", not flags["special"])
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise _unexpected(f"{where}: {flag}", "true or false", value)
    return text, AddedToken(token_id, **flags)


def _named_tokens(*sources: tuple[Path, dict[str, Any]]) -> list[tuple[Path, str, str, dict[str, Any]]]:
    """Return file, field, text and entry of each named special token, in the order in which new tokens get ids."""
    found: dict[str, tuple[Path, str, str, dict[str, Any]]] = {}
    for path, content in sources:
        for field, value in _special_values(path, content):
            entry = {**value, "special": True} if isinstance(value, dict) else {"content": value, "special": True}
            text, _ = _token(entry, 0, f"{path}: {field}")
            known = found.setdefault(field, (path, field, text, entry))
            if known[2] != text:
                raise ValueError(f"{field} is {known[2]!r} in {known[0]}, but {text!r} in {path}")
    return list(found.values())


def _special_values(path: Path, content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for field in _NAMED:
        if content.get(field) is not None:
            yield field, content[field]
    for field, value in content.items():
        if field not in _NAMED and field.endswith("_token") and isinstance(value, (str, dict)):
            yield field, value
    # transformers 4's name. transformers 5 reads it from tokenizer_config.json only.
    old = "additional_special_tokens" if path.name == "tokenizer_config.json" else ""
    field = old if old in content and not content.get("extra_special_tokens") else "extra_special_tokens"
    values = content.get(field) or []
    if not isinstance(values, (list, dict)):
        raise _unexpected(f"{path}: {field}", "a list of tokens", values)
    for value in values.values() if isinstance(values, dict) else values:
        yield f"{field} {value.get('content') if isinstance(value, dict) else value!r}", value


def _check_pieces(
    tokens: _Tokens, model: dict[str, Any], path: Path, ids: Mapping[str, int], pieces: Sequence[str], model_path: Path
) -> None:
    """Raise ValueError if an added token, or a piece of tokenizer.json, has another id than in tokenizer.model.

    Placeholders such as <unused7> may have another name. transformers 4 wrote the piece <0x09> as a tab.
    """
    for text, token in tokens.by_text.items():
        known, piece = ids.get(text), pieces[token.token_id] if token.token_id < len(pieces) else text
        if known not in (None, token.token_id) and text != IMAGE_TOKEN:
            raise ValueError(
                f"{text!r} has the id {token.token_id} in {tokens.paths[text]}, but {known} in {model_path}"
            )
        if piece != text and not (piece.startswith("<") and piece.endswith(">")):
            raise ValueError(
                f"id {token.token_id} belongs to both {piece!r} (in {model_path}) and {text!r} (in {tokens.paths[text]})"
            )
    vocabulary = _field(path, model, "vocab", dict) if model.get("type") == "BPE" else {}
    for text, token_id in vocabulary.items():
        known = ids.get("<0x09>" if text == "\t" else text)
        if known != token_id and (not isinstance(token_id, int) or tokens.texts.get(token_id) != text):
            raise ValueError(f"{text!r} has the id {token_id!r:.20} in {path}, but {known or 'none'} in {model_path}")


def _unexpected(where: str, expected: str, value: object) -> ValueError:
    return ValueError(f"{where}: expected {expected}, got {value!r:.80}")
