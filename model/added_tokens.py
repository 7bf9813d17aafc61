"""Added tokens: text is split around them before sentencepiece encodes it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

IMAGE_TOKEN = "<image>"
LOC_TOKENS = tuple(f"<loc{n:04d}>" for n in range(1024))
SEG_TOKENS = tuple(f"<seg{n:03d}>" for n in range(128))

# Use one pattern for each family: with an alternation of all 1152 names, every "<" in the text costs 1152 comparisons.
_FAMILIES = {
    LOC_TOKENS: "<loc(?:0[0-9]{3}|10[01][0-9]|102[0-3])>",
    SEG_TOKENS: "<seg(?:0[0-9]{2}|1[01][0-9]|12[0-7])>",
}
# Unicode's white space. Python's str.strip also removes U+001C to U+001F.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


@dataclass(frozen=True)
class AddedToken:
    """A token that text is split around. Decoding leaves special tokens out.

    The other flags have their meaning in the `tokenizers` library: `lstrip` and `rstrip` include the white space before and after
    the token, a `single_word` token does not adjoin a letter, digit or underscore, and `normalized` tokens are searched after all
    others, in text whose spaces have become "▁".
    """

    token_id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class Splitter:
    """Finds added tokens as the `tokenizers` library does: the leftmost token, and of several at one place the longest."""

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        as_written = {text: token for text, token in tokens.items() if not token.normalized}
        normalized = {_normalize(text): token for text, token in tokens.items() if token.normalized}
        self._groups = [(_pattern(group), group) for group in (as_written, normalized) if group]

    def split(self, text: str) -> list[str | AddedToken]:
        """Return the added tokens of a text and the texts between them, in order."""
        parts: list[str | AddedToken] = [text] if text else []
        for pattern, tokens in self._groups:
            parts = [
                piece
                for part in parts
                for piece in (_split(part, pattern, tokens) if isinstance(part, str) else [part])
            ]
        return parts


def _pattern(texts: Iterable[str]) -> re.Pattern[str]:
    lengths = {re.escape(text): len(text) for text in texts}
    for family, pattern in _FAMILIES.items():
        names = [re.escape(text) for text in family]
        if all(name in lengths for name in names):
            lengths = {name: length for name, length in lengths.items() if name not in names}
            lengths[pattern] = len(family[0])
    return re.compile("|".join(sorted(lengths, key=lengths.__getitem__, reverse=True)))


def _split(text: str, pattern: re.Pattern[str], tokens: Mapping[str, AddedToken]) -> Iterator[str | AddedToken]:
    normalized = next(iter(tokens.values())).normalized
    searched = _normalize(text) if normalized else text  # character by character, so positions in both agree
    end = 0
    for match in pattern.finditer(searched):
        token = tokens[match.group()]
        start, stop = match.span()
        if token.single_word and (_is_word(searched[start - 1 : start]) or _is_word(searched[stop : stop + 1])):
            continue
        # A token inside the white space that the previous token included still counts, unless it includes white space before
        # it, too.
        if token.lstrip:
            start = end + len(searched[end:start].rstrip(_WHITE_SPACE))
        while token.rstrip and stop < len(searched) and searched[stop] in _WHITE_SPACE:
            stop += 1
        if end < start:
            yield text[end:start]
        if start < stop:
            yield token
        end = stop
    if end < len(text):
        yield text[end:]


def _normalize(text: str) -> str:
    return text.replace(" ", "▁")


def _is_word(character: str) -> bool:
    """Return whether a character is in Unicode's `\\w`, from which Python's differs for combining marks and numbers."""
    category = unicodedata.category(character) if character else "Zs"
    return category[0] in "LM" or category in ("Nd", "Nl", "Pc") or character in ("\u200c", "\u200d")


def lone_surrogate(text: str) -> str | None:
    """Return the number of the first character that UTF-8 cannot encode, or None."""
    found = re.search("[\ud800-\udfff]", text)
    return f"U+{ord(found.group()):04X}" if found else None
