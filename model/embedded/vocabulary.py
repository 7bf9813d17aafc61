"""Train the small sentencepiece tokenizer of the built-in model, with the layout of the released models' tokenizer."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from ..files import write_atomically
from ..tokenizer import IMAGE_TOKEN, LOC_TOKENS, SEG_TOKENS
from .tasks import LANGUAGES, caption, plural
from .world import names

NUM_TEXT_PIECES = 1600  # 4 control pieces, "\n", 256 bytes; the rest are characters and word pieces
# Sentencepiece learns from word counts. Every answer contains names, so they are repeated until they become whole words.
_REPEATS = {language: 20 if language == "en" else 8 for language in LANGUAGES}

_PROMPTS = ("caption", "cap", "describe", "ocr", "answer", "question", "detect", "segment")

_QUESTIONS = (
    "what is this?",
    "what is in the picture?",
    "what is on the left?",
    "what is on the right?",
    "what is at the top?",
    "what is at the bottom?",
    "what is above the {}?",
    "what is below the {}?",
    "what is to the left of the {}?",
    "what is to the right of the {}?",
    "what is next to the {}?",
    "what color is the {}?",
    "what color is the background?",
    "where is the {}?",
    "which is larger, the {} or the {}?",
    "is the {} to the left of the {}?",
    "is there a {} in the picture?",
    "how many objects are there?",
    "what is the value of {}?",
    "which bar is the highest?",
    "which point is the lowest?",
    "how many bars are there?",
    "how many points are there?",
    "what is only in the first picture?",
    "what is only in the second picture?",
    "what is in both pictures?",
    "which picture shows a {}?",
    "which digit?",
)

_WORDS = {
    "en": (
        "yes no none left right top bottom center middle above below over under behind between beside near inside outside "
        "zero one two three four five six seven eight nine ten first second both "
        "red orange yellow green blue purple violet pink brown black white grey gray gold silver light dark "
        "plain striped checkered gradient background picture image photo drawing object thing animal fruit vegetable food "
        "vehicle toy plant large small big little larger smaller bigger left-hand the a an and or of in on at to with is are"
    ),
    "es": (
        "sí no izquierda derecha arriba abajo uno dos tres cuatro rojo verde azul amarillo negro blanco el la los las un "
        "una y de en con qué dónde cuántos hay es"
    ),
    "fr": (
        "oui non gauche droite haut bas un deux trois quatre rouge vert bleu jaune noir blanc le la les une et de du dans "
        "avec quoi où combien est il y a"
    ),
    "de": (
        "ja nein links rechts oben unten eins zwei drei vier rot grün blau gelb schwarz weiß der die das ein eine und in "
        "mit was wo wie viele ist sind"
    ),
    "pt": (
        "sim não esquerda direita acima abaixo um dois três quatro vermelho verde azul amarelo preto branco o a os as uma "
        "e de em com que onde quantos há é"
    ),
    "it": (
        "sì no sinistra destra sopra sotto uno due tre quattro rosso verde blu giallo nero bianco il lo la i gli le una e "
        "di in con che dove quanti è sono"
    ),
}


def train_tokenizer(path: str | Path) -> None:
    """Train the tokenizer and write it to `path`, a sentencepiece `.model` file of about 40 kB.

    Byte-pair encoding with byte fallback and Gemma's conventions: <pad> 0, <eos> 1, <bos> 2, <unk> 3; no normalisation,
    no dummy prefix, single digits, "\\n" a piece of its own. After the `NUM_TEXT_PIECES` learnt pieces come
    <loc0000>…<loc1023>, <seg000>…<seg127> and <image>, in the released models' order. Every run writes the same bytes.
    Raises ModuleNotFoundError without the packages `emoji` and `protobuf` (this package's `train` extra).
    """
    try:
        # Sentencepiece gives user-defined symbols the first free ids. Placing them last needs its protobuf schema.
        from sentencepiece import sentencepiece_model_pb2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "training a tokenizer needs the package `protobuf`: pip install protobuf, "
            "or install this package's `train` extra"
        ) from error
    proto = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # protobuf creates the class at import
    model = proto.FromString(_train_text_pieces())
    for piece in (*LOC_TOKENS, *SEG_TOKENS, IMAGE_TOKEN):
        model.pieces.add(piece=piece, score=0.0, type=model.SentencePiece.USER_DEFINED)
    model.trainer_spec.vocab_size = len(model.pieces)
    write_atomically(Path(path), model.SerializeToString(deterministic=True))


def corpus() -> Iterator[str]:
    """Yield the tokenizer's training sentences: names and prompts in six languages, questions and common words."""
    for language in LANGUAGES:
        things = list(names(language).values())
        for _ in range(_REPEATS[language]):
            yield from (f"{prompt} {language}" for prompt in _PROMPTS)
            # as the first word of a caption, and after a space
            yield from (caption([thing, thing], language) for thing in things)
    for name in names("en").values():
        for _ in range(_REPEATS["en"]):
            yield from (f"detect {name}", f"segment {name}", f"answer en how many {plural(name)} are there?")
            yield from (f"answer en {question.replace('{}', name)}" for question in _QUESTIONS if "{}" in question)
    for question in _QUESTIONS:
        yield from [f"answer en {question}"] * (8 * _REPEATS["en"])
    for language, words in _WORDS.items():
        for word in words.split():  # after a space, and as the first word of an answer
            yield from [word, f"answer {word}"] * _REPEATS[language]
    yield from (f"{number}" for number in range(1000))


def _train_text_pieces() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=corpus(),
        model_writer=model,
        model_type="bpe",
        vocab_size=NUM_TEXT_PIECES,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        byte_fallback=True,
        user_defined_symbols=["\n"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return model.getvalue()
