"""The processor, compared with transformers' PaliGemmaProcessor on the same files."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import AddedToken, AutoProcessor, PaliGemmaConfig, PaliGemmaProcessor

from pg_kernels.model import images as images_module
from pg_kernels.model.images import MAX_IMAGE_PIXELS, load_image
from pg_kernels.model.processor import Processor
from pg_kernels.model.tokenizer import LOC_TOKENS, SEG_TOKENS, Tokenizer

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "detect",
    "segment",
    "answer",
    "en",
    "what",
    "is",
    "in",
    "image",
    "caption",
    "describe",
    "a",
    "dog",
    "person",
    "car",
    "red",
    "blue",
    "große",
    "café",
    "naïve",
    "日本語",
    "猫",
    "犬",
    "ocr",
    "question",
    "how",
    "many",
    "people",
    "there",
    "are",
    "tree",
    "house",
    "12",
    "7",
    "2024",
    "hello,",
    "world!",
    "don't",
    "(stop)",
]
SPACES = ["▁" * n for n in range(2, 32)]
CONTROL = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "pad_id": 0, "eos_id": 1, "bos_id": 2}

PROMPTS = [
    "caption en",
    "",
    " ",
    "detect cat ; dog",
    "answer en how many  people   are there?",
    "  leading and trailing   ",
    "tab\tand\nnew\n\nlines\n",
    "\n",
    " \n ",
    "日本語 café naïve e\u0301 ﬁ",
    "emoji 😀👩‍👩‍👧 and 𝄞 \u200d \u00a0 end",
    "caption <loc0000><loc0512><loc1023><loc0007>",
    "<loc0001>cat<loc0002> dog <loc0003>",
    "<seg000><seg127>x <seg064> y",
    "not tokens: <loc1024> <loc00001> <loc١٢٣٤> <seg128> <seg1> <loc0001",
    "<bos>hi<eos> <pad><unk><mask> <start_of_turn>",
    "literal ▁ and ▁a pieces <0x41>",
    "1234567890 3.14 don't (stop)",
    "a" + " " * 31 + "b",
    " " * 17,
    "\r\n\x00\x7f",
]
SUFFIXES = PROMPTS[::-1]


def train_tokenizer(extra_symbols: list[str]) -> bytes:
    rng = random.Random(0)
    lines = [(" " * rng.choice([1, 1, 1, 2])).join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(800)]
    symbols = ["<mask>", "\n", "\n\n", *SPACES, *extra_symbols]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=600 + len(symbols),
        hard_vocab_limit=False,
        unk_id=3,
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=symbols,
        minloglevel=2,
        **CONTROL,
    )
    return model.getvalue()


@pytest.fixture(scope="session", params=["released", "appended"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint folder whose tokenizer has the loc and seg pieces, or lacks them, so that they are appended."""
    path = tmp_path_factory.mktemp(request.param)
    released = request.param == "released"
    proto = train_tokenizer([*LOC_TOKENS, *SEG_TOKENS] if released else [])
    (path / "tokenizer.model").write_bytes(proto)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto).get_piece_size()
    # transformers adds <image> first, so in both folders it follows the last piece.
    write_folder(path, image_token_id=pieces)
    return path


def write_folder(path: Path, image_token_id: int, image_size: int = 28) -> None:
    vision = {"image_size": image_size, "patch_size": 14, "hidden_size": 32, "num_attention_heads": 2}
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", "vocab_size": 4096, "max_position_embeddings": 256},
        vision_config={"model_type": "siglip_vision_model", **vision},
        image_token_index=image_token_id,
    )
    config.save_pretrained(path)
    tokenizer_config = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>"}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "image_seq_length": (image_size // 14) ** 2,
        "size": {"height": image_size, "width": image_size},
        "resample": 3,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))


@pytest.fixture(scope="session")
def ours(folder: Path) -> Processor:
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="session")
def theirs(folder: Path) -> PaliGemmaProcessor:
    return PaliGemmaProcessor.from_pretrained(folder)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(40, 60), (28, 28), (7, 3), (1, 1), (301, 97)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def assert_same(mine: dict[str, torch.Tensor], reference: dict) -> None:
    for key, value in mine.items():
        expected = torch.as_tensor(np.asarray(reference[key]))
        assert torch.equal(value, expected.to(value.dtype)), key


def test_ids_of_special_tokens(ours: Processor, theirs: PaliGemmaProcessor) -> None:
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n", "<image>", *LOC_TOKENS, *SEG_TOKENS]
    assert [ours.tokenizer.encode(name) for name in names] == [
        [i] for i in theirs.tokenizer.convert_tokens_to_ids(names)
    ]
    assert len(ours.tokenizer) == len(theirs.tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_transformers(
    side: str, ours: Processor, theirs: PaliGemmaProcessor, images: list[Image.Image]
) -> None:
    pictures = [images[i % len(images)] for i in range(len(PROMPTS))]
    arguments = {"padding": True, "padding_side": side, "return_tensors": "pt"}
    expected = theirs(images=pictures, text=PROMPTS, **arguments)
    inputs = ours(pictures, PROMPTS, padding_side=side)
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids", "pixel_values"}
    assert_same(inputs, expected)

    expected = theirs(images=pictures, text=PROMPTS, suffix=SUFFIXES, **arguments)
    inputs = ours(pictures, PROMPTS, SUFFIXES, padding_side=side)
    assert set(inputs) == set(expected)
    assert_same(inputs, expected)
    assert {key: value.dtype for key, value in inputs.items()} == {
        key: torch.float32 if key == "pixel_values" else torch.int64 for key in inputs
    }


def test_random_text_equals_transformers(ours: Processor, theirs: PaliGemmaProcessor) -> None:
    rng = random.Random(1)
    parts = [
        *WORDS,
        " ",
        "  ",
        "     ",
        "\n",
        "\n\n\n",
        "<loc0003>",
        "<seg001>",
        "<",
        ">",
        "<loc",
        "é",
        "ß",
        "🙂",
        "▁",
        "\t",
        ";",
    ]
    for _ in range(500):
        text = "".join(rng.choices(parts, k=rng.randint(1, 15)))
        assert ours.tokenizer.encode(text) == theirs.tokenizer(text, add_special_tokens=False).input_ids, repr(text)


def test_inputs_move_together(ours: Processor, theirs: PaliGemmaProcessor, images: list[Image.Image]) -> None:
    inputs = ours(images[0], "a", suffixes="b")
    reference = theirs(images=images[0], text="a", suffix="b", return_tensors="pt")
    assert isinstance(inputs, dict) and inputs.input_ids is inputs["input_ids"]
    for arguments in ((torch.bfloat16,), ("cpu",), ("cpu", torch.float16), (torch.device("cpu"), torch.float32)):
        assert inputs.to(*arguments) is inputs
        reference.to(*arguments)
        assert {name: tensor.dtype for name, tensor in inputs.items()} == {
            name: tensor.dtype for name, tensor in reference.items()
        }
    assert torch.equal(inputs.pixel_values, reference["pixel_values"])
    assert {tensor.device.type for tensor in ours(images[0], "a").to(device="meta", dtype=torch.float64).values()} == {
        "meta"
    }
    for same in (pickle.loads(pickle.dumps(inputs)), copy.deepcopy(inputs), copy.copy(inputs)):
        assert type(same) is type(inputs) and same.keys() == inputs.keys()
        assert torch.equal(same.to("cpu").input_ids, inputs.input_ids)
    (batch,) = torch.utils.data.DataLoader([inputs, inputs], batch_size=2, num_workers=1)
    assert torch.equal(batch.to("cpu").input_ids, torch.stack([inputs.input_ids] * 2))
    (batch,) = torch.utils.data.DataLoader(["a"], collate_fn=lambda texts: ours(images[0], texts))
    assert batch.to(torch.bfloat16).pixel_values.dtype == torch.bfloat16
    with pytest.raises(AttributeError, match="no 'other' among input_ids, attention_mask"):
        _ = inputs.other
    for dtype in (torch.int64, "float32"):
        with pytest.raises(TypeError, match="dtype: expected a floating-point dtype"):
            inputs.to(dtype=dtype)


def test_several_images_per_prompt(ours: Processor, theirs: PaliGemmaProcessor, images: list[Image.Image]) -> None:
    groups = [[images[0], images[1]], [images[2]]]
    arguments = {"padding": True, "return_tensors": "pt"}
    expected = theirs(images=groups, text=["compare", "caption en"], **arguments)
    assert_same(ours(groups, ["compare", "caption en"]), expected)
    for prompt in [
        "<image><image> compare",
        "<image> and <image>which?",
        "first <image> second <image>",
        "<image><image>",
    ]:
        expected = theirs(images=images[:2], text=prompt, **arguments)
        assert_same(ours(images[:2], prompt), expected)
        assert_same(ours([images[:2]], prompt), expected)


def test_counts_must_agree(ours: Processor, images: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match=r"1 <image> in .* 2 images"):
        ours([images[:2]], "<image> compare")
    with pytest.raises(ValueError, match=r"3 <image> in .* 2 images"):
        ours(images[:2], ["<image><image> a", "<image> b"])
    with pytest.raises(ValueError, match=r"2 for 1 prompts.*\[\[a, b\]\]"):
        ours(images[:2], "caption en")
    with pytest.raises(ValueError, match="1 for 2 prompts"):
        ours(images[0], ["a", "b"])
    with pytest.raises(ValueError, match="suffixes: 1 for 2 prompts"):
        ours(images[:2], ["a", "b"], "c")
    with pytest.raises(ValueError, match="suffixes: <image>"):
        ours(images[0], "a", "<image>")
    with pytest.raises(ValueError, match="none given"):
        ours([], [])
    with pytest.raises(TypeError, match="prompts"):
        ours(images[0], 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not both"):
        ours([images[0], [images[1]]], ["a", "b"])
    with pytest.raises(ValueError, match="padding_side"):
        ours(images[0], "a", padding_side="both")


def test_too_long_a_prompt_is_refused(ours: Processor, images: list[Image.Image]) -> None:
    text_tokens = len(ours.tokenizer.encode("cat " * 300 + "\n")) + 1
    with pytest.raises(ValueError, match=f"4 image tokens and {text_tokens} text tokens make {text_tokens + 4}.* 256"):
        ours(images[0], "cat " * 300)


def test_decode_equals_transformers(ours: Processor, theirs: PaliGemmaProcessor) -> None:
    rows = [ours.tokenizer.encode(text.replace("<eos>", "")) for text in PROMPTS]
    rng = random.Random(2)
    vocabulary = [i for i in range(len(ours.tokenizer)) if i != ours.tokenizer.eos_id]
    rows += [rng.choices(vocabulary, k=30) for _ in range(50)]
    # Mostly byte pieces, including runs that are not valid UTF-8.
    rows += [rng.choices(range(30, 350), k=30) for _ in range(100)]
    expected = theirs.batch_decode(rows, skip_special_tokens=True)
    assert ours.decode(rows) == expected
    width = max(map(len, rows))
    padded = torch.tensor([row + [1] + [0] * (width - len(row)) for row in rows])
    assert ours.decode(padded) == expected
    assert ours.decode(padded[0]) == expected[:1]
    assert ours.decode([]) == [""]


def test_decode_stops_at_eos_and_skips_unknown_ids(ours: Processor) -> None:
    ids = ours.tokenizer.encode("a cat")
    assert ours.decode([*ids, 10_000_000, -100, ours.tokenizer.eos_id, *ids]) == ["a cat"]


@pytest.mark.parametrize("text", ["a 😀 b", "日本語 𝄞", " lead  trail ", "<loc0001><seg002> cat", "é" * 5, ""])
def test_stream_gives_whole_characters(ours: Processor, text: str) -> None:
    ids = [*ours.tokenizer.encode(text), ours.tokenizer.eos_id, *ours.tokenizer.encode("more")]
    pieces = list(ours.stream(ids))
    assert "".join(pieces) == text
    assert all(piece and "\ufffd" not in piece for piece in pieces)


def test_stream_shows_a_character_with_its_last_byte(ours: Processor) -> None:
    ids = ours.tokenizer.encode("😀🙂")
    assert len(ids) == 8
    decoder = ours.stream_decoder()
    assert [decoder.push(i) for i in ids] == ["", "", "", "😀", "", "", "", "🙂"]
    assert decoder.push(ids[0]) == ""
    assert decoder.finish() == "\ufffd"


def test_released_ids_of_an_appended_vocabulary() -> None:
    proto = train_tokenizer([])
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto).get_piece_size()
    for given in (None, pieces + 1152):
        tokenizer = Tokenizer(proto, image_token_id=given)
        assert tokenizer.encode("<loc0000><loc1023><seg000><seg127><image>") == [
            pieces + n for n in (0, 1023, 1024, 1151, 1152)
        ]
    assert Tokenizer(proto, image_token_id=5000).encode("<image>") == [5000]


def test_added_tokens_of_the_folder_are_honoured(tmp_path: Path) -> None:
    proto = train_tokenizer([])
    (tmp_path / "tokenizer.model").write_bytes(proto)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<seg000>": 3000, "<image>": 3001}))
    entry = {"content": "<extra>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"3002": entry}}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("<seg000><image><extra><loc0000><seg001>") == [3000, 3001, 3002, 3003, 3003 + 1024]
    assert tokenizer.decode([3000, 3002]) == "<seg000>"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<seg000>": 3000, "<image>": 3000}))
    with pytest.raises(ValueError, match="3000 belongs to both"):
        Tokenizer.from_pretrained(tmp_path)


ADDED = [
    "<my>",
    "two words",
    "<0x41>",
    "<loc0001>x",
    "<lo",
    AddedToken("<left>", lstrip=True),
    AddedToken("<right>", rstrip=True, normalized=False),
    AddedToken("both", lstrip=True, rstrip=True, normalized=False),
    AddedToken("\t", lstrip=True, rstrip=True, normalized=False),
    AddedToken("word", single_word=True),
    AddedToken("WORD", single_word=True, normalized=False),
    AddedToken("cat", normalized=False),
    AddedToken("<hidden>", special=True),
]


def add_tokens(folder: Path, target: Path, **attributes: str) -> PaliGemmaProcessor:
    """Add tokens with transformers, save its files, and put `tokenizer.model` beside them."""
    processor = PaliGemmaProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(ADDED)
    for name, value in attributes.items():
        setattr(processor.tokenizer, name, value)
    processor.save_pretrained(target)
    for name in ("config.json", "tokenizer.model"):
        (target / name).write_bytes((folder / name).read_bytes())
    return AutoProcessor.from_pretrained(target)


def test_tokens_added_with_transformers(folder: Path, tmp_path: Path) -> None:
    theirs = add_tokens(folder, tmp_path, eos_token="<my>")
    assert not (tmp_path / "added_tokens.json").exists()
    assert "added_tokens_decoder" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    ours = Processor.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "again")
    again = Tokenizer.from_pretrained(tmp_path / "again")
    assert len(ours.tokenizer) == len(again) == len(theirs.tokenizer)
    assert ours.tokenizer.eos_id == again.eos_id == theirs.tokenizer.eos_token_id == ours.tokenizer.encode("<my>")[0]
    texts = [str(token) for token in ADDED]
    rng = random.Random(0)
    parts = [*texts, *texts, *WORDS[:8], " ", "  ", "\n", "\n\n", "_", "²", "\u0301", "\x1c", "<", ">", "<loc0003>"]
    parts += ["<seg001>", "<image>", "<bos>", "é"]
    for _ in range(400):
        text = "".join(rng.choices(parts, k=rng.randint(1, 12)))
        expected = theirs.tokenizer(text, add_special_tokens=False).input_ids
        assert ours.tokenizer.encode(text) == again.encode(text) == expected, repr(text)
        ids = [token_id for token_id in expected if token_id != ours.tokenizer.eos_id]
        decoded = theirs.tokenizer.decode(ids, skip_special_tokens=True)
        assert ours.tokenizer.decode(ids) == again.decode(ids) == "".join(ours.stream(ids)) == decoded, repr(text)


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({"added_tokens.json": {"<image>": 0, "<my>": 1, "<its>": 2}}, {"<my>": 1, "<its>": 2}),
        (
            {
                "added_tokens.json": {"<image>": 0, "<my>": 1},
                "special_tokens_map.json": {"extra_special_tokens": ["<my>"]},
            },
            {"<my>": 1},
        ),
        ({"tokenizer_config.json": {"extra_special_tokens": ["<image>", "<new>"]}}, {"<new>": 1}),
        ({"tokenizer_config.json": {"extra_special_tokens": {"a": "<image>", "b": "<new>"}}}, {"<new>": 1}),
        ({"special_tokens_map.json": {"eos_token": {"content": "<e>", "lstrip": True}}}, {"<e>": 0, "<image>": 1}),
    ],
)
def test_tokens_of_other_files(folder: Path, tmp_path: Path, changes: dict, added: dict[str, int]) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    write_folder(tmp_path, image_token_id=pieces + added.get("<image>", 0))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    for name, content in changes.items():
        if name == "added_tokens.json":
            content = {text: pieces + offset for text, offset in content.items()}
        elif name == "tokenizer_config.json":
            content = {"tokenizer_class": "GemmaTokenizer", **content}
        (tmp_path / name).write_text(json.dumps(content))
    theirs, ours = AutoProcessor.from_pretrained(tmp_path).tokenizer, Processor.from_pretrained(tmp_path).tokenizer
    text = f"a{''.join(added)} <image>b <loc0007>"
    expected = theirs(text, add_special_tokens=False).input_ids
    assert all(pieces + offset in expected for offset in added.values())
    assert ours.encode(text) == expected and ours.eos_id == theirs.eos_token_id
    kept = [token_id for token_id in expected if token_id != ours.eos_id]
    assert ours.decode(kept) == theirs.decode(kept, skip_special_tokens=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with added tokens as transformers saves it, and its `tokenizer.model`."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("saved")
    (source / "tokenizer.model").write_bytes(train_tokenizer([]))
    write_folder(source, sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model")).get_piece_size())
    add_tokens(source, target)
    return target


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "added_tokens.json",
            {"<my>": 9000},
            r"'<my>' has the id \d+ in .*tokenizer.json, but 9000 in .*added_tokens.json",
        ),
        ("added_tokens.json", {"<x>": -1}, r"added_tokens.json: '<x>': id: expected an integer from 0 to .*, got -1"),
        ("added_tokens.json", {"<x>": None}, r"added_tokens.json: '<x>': id: expected an integer .*, got None"),
        ("added_tokens.json", {"<x>": 2**70}, r"added_tokens.json: '<x>': id: expected an integer"),
        (
            "added_tokens.json",
            {"<x>": 1450},
            r"id 1450 belongs to both '.*' \(in .*tokenizer.(?:json|model)\) and '<x>'",
        ),
        ("added_tokens.json", {"a": 2000}, r"'a' has the id 2000 in .*added_tokens.json, but \d+ in .*tokenizer.model"),
        ("added_tokens.json", {"\ud800": 2000}, r"added_tokens.json: .*: content: expected a text"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": None},
            r"_config.json: added_tokens_decoder: expected an ob",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "y"}}},
            r"\['x'\]: id: expected an integer",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9000": "y"}}, r"\['9000'\]: expected an object, got 'y'"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"9000": {}}},
            r"\['9000'\]: content: expected a text, got No",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"9000": {"content": "y", "lstrip": "no"}}},
            r"\['9000'\]: lstrip: expected true or false, got 'no'",
        ),
        (
            "tokenizer_config.json",
            {"eos_token": 1},
            r"tokenizer_config.json: eos_token: content: expected a text, got 1",
        ),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": 1},
            r"extra_special_tokens: expected a list of tokens, got 1",
        ),
        ("special_tokens_map.json", {"eos_token": "<my>"}, r"eos_token is '<eos>' in .*, but '<my>' in .*_map.json"),
        ("tokenizer.json", {"added_tokens": {}}, r"tokenizer.json: added_tokens: expected a list, got \{\}"),
        ("tokenizer.json", {"added_tokens": [3]}, r"tokenizer.json: added_tokens\[0\]: expected an object, got 3"),
        ("tokenizer.json", {"model": []}, r"tokenizer.json: model: expected an object, got \[\]"),
        (
            "tokenizer.json",
            {"model": {"type": "BPE", "vocab": {"a": []}}},
            r"'a' has the id \[\] in .*tokenizer.json, but",
        ),
        ("added_tokens.json", {"<one_more>": 400_000}, r"ids up to 400000, but .*config\.json has vocab_size"),
        ("config.json", {"image_token_index": 9000}, r"'<image>' has the id \d+ in .*, but 9000 in .*config.json"),
    ],
)
def test_token_files_that_contradict(saved: Path, tmp_path: Path, name: str, change: dict, message: str) -> None:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=message):
        Processor.from_pretrained(tmp_path)


def test_the_tokenizer_model_of_another_tokenizer(saved: Path, tmp_path: Path) -> None:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(["<one_more>"]))
    with pytest.raises(
        ValueError, match="id .*tokenizer.* and .*tokenizer.json|id .*tokenizer.json, but .*tokenizer.model"
    ):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(
        FileNotFoundError, match="tokenizer.model is missing .tokenizer.json is there, but cannot stand in"
    ):
        Processor.from_pretrained(tmp_path)


def test_save_and_load(ours: Processor, folder: Path, images: list[Image.Image], tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "preprocessor_config.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    pictures = [images[i % len(images)] for i in range(len(PROMPTS))]
    expected = ours(pictures, PROMPTS, SUFFIXES)
    assert_same(Processor.from_pretrained(tmp_path)(pictures, PROMPTS, SUFFIXES), expected)
    auto = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(auto, PaliGemmaProcessor)
    theirs = auto(
        images=pictures, text=PROMPTS, suffix=SUFFIXES, padding=True, padding_side="left", return_tensors="pt"
    )
    assert_same(expected, theirs)


def test_reads_the_processor_config_of_transformers_5(folder: Path, theirs: PaliGemmaProcessor, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert (tmp_path / "processor_config.json").exists() and not (tmp_path / "preprocessor_config.json").exists()
    content = json.loads((tmp_path / "processor_config.json").read_text())
    content["image_processor"]["image_std"] = [0.25, 0.5, 1.0]
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    loaded = Processor.from_pretrained(tmp_path)
    assert loaded.image_std == (0.25, 0.5, 1.0)
    assert loaded.tokenizer.encode("<image><loc0000><seg127>") == theirs.tokenizer.convert_tokens_to_ids(
        ["<image>", "<loc0000>", "<seg127>"]
    )


def test_missing_and_broken_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Processor.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        Processor.from_pretrained(tmp_path)
    write_folder(tmp_path, image_token_id=2000)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model is missing \(tokenizer\.json is there"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="tokenizer.model: not a sentencepiece model"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json cannot be read as a JSON object"):
        Processor.from_pretrained(tmp_path)
    write_folder(tmp_path, image_token_id=2000)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 56, "width": 56}}))
    with pytest.raises(ValueError, match=r"preprocessor_config.json: size .*56.* image_size 28"):
        Processor.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": []}, r"size \[\], but .* has image_size 28"),
        ({"do_normalize": "no"}, "do_normalize is 'no'"),
        ({"do_resize": False}, "do_resize is False"),
        ({"rescale_factor": 1.0}, "rescale_factor: expected 1/255, got 1.0"),
        ({"rescale_factor": "x"}, "rescale_factor: expected 1/255, got 'x'"),
        ({"resample": 9}, "resample: expected one of Pillow's numbers, 0 to 5, got 9"),
        ({"resample": [3]}, "resample: expected one of Pillow's numbers"),
        ({"image_mean": [0.5]}, r"image_mean: expected a number or three of them, got \[0.5\]"),
        ({"image_mean": "x"}, "image_mean: expected"),
        ({"image_mean": [0.5, None, 0.5]}, "image_mean: expected"),
        ({"image_std": [0.5, float("nan"), 0.5]}, "image_std: expected"),
        ({"image_std": 0}, "image_std: expected"),
        ({"image_std": 10**400}, "image_std: expected"),
    ],
)
def test_odd_image_configs_are_named(saved: Path, tmp_path: Path, name: str, change: dict, message: str) -> None:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    nested = json.loads((tmp_path / "processor_config.json").read_text())
    content = nested["image_processor"] | change
    if name == "processor_config.json":
        content = {**nested, "image_processor": content}
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        Processor.from_pretrained(tmp_path)


def test_a_null_is_as_if_it_were_not_there(saved: Path, tmp_path: Path) -> None:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    fields = ("size", "resample", "image_mean", "image_std", "do_resize", "rescale_factor")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict.fromkeys(fields)))
    assert Processor.from_pretrained(tmp_path).image_mean == (0.5, 0.5, 0.5)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text('{"image_processor": [1]}')
    with pytest.raises(ValueError, match=r"processor_config.json: image_processor: expected an object, got \[1\]"):
        Processor.from_pretrained(tmp_path)


def test_half_of_a_surrogate_pair_is_no_text(ours: Processor, images: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\]: it holds U\+D83D, half of a surrogate pair"):
        ours(images[:2], ["a", "b\ud83d"])
    with pytest.raises(ValueError, match=r"suffixes\[0\]: it holds U\+DC80"):
        ours(images[0], "a", "\udc80")
    with pytest.raises(ValueError, match=r"text: it holds U\+D83D"):
        ours.tokenizer.encode("\ud83d")


@pytest.mark.parametrize("ids", [None, 3, "12", [1.5], [[1], None], [[1], ["a"]], [float("inf")], torch.zeros(2)])
def test_ids_are_integers(ours: Processor, ids: object) -> None:
    with pytest.raises(TypeError, match="^ids: "):
        ours.decode(ids)  # type: ignore[arg-type]
    assert ours.decode([2**70, -(2**70)]) == [""]


def test_damaged_tokenizer_models_are_named(folder: Path, tmp_path: Path) -> None:
    content = (folder / "tokenizer.model").read_bytes()
    rng = random.Random(0)
    path = tmp_path / "tokenizer.model"
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            Tokenizer.from_file(path).encode("a cat")
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("mode", "name", "error", "message"),
    [
        ("F", "float.tiff", ValueError, "float.tiff: Pillow mode 'F' has no fixed range"),
        ("I", "int.tiff", ValueError, "int.tiff: Pillow mode 'I' has no fixed range"),
        ("RGB", "cut.png", OSError, "cut.png: cannot read the image, it may be truncated"),
        ("RGB", "cut.webp", OSError, "cut.webp: "),
        ("RGB", "cut.gif", OSError, "cut.gif: cannot read the image, it may be truncated"),
    ],
)
def test_images_that_cannot_be_read(mode: str, name: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    (image.convert("L").convert(mode) if mode in "IF" else image).save(tmp_path / name)
    if name.startswith("cut"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-400])
    with pytest.raises(error, match=message):
        load_image(tmp_path / name)


def test_a_reader_that_fails_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 3)).save(path)

    def fail(*_: object) -> None:
        raise KeyError("zTXt")

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(OSError, match="a.png: cannot read the image, .*KeyError: 'zTXt'"):
        load_image(path)
    with Image.open(path) as image, pytest.raises(OSError, match="a.png: cannot read the image, .*KeyError"):
        load_image(image)


def test_the_first_picture_of_an_animation(ours: Processor, theirs: PaliGemmaProcessor, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        expected = theirs(images=str(tmp_path / name), text="<image>a", return_tensors="pt")["pixel_values"]
        assert torch.equal(ours(tmp_path / name, "a").pixel_values, expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_image_modes_equal_transformers(mode: str, ours: Processor, theirs: PaliGemmaProcessor) -> None:
    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 256, (50, 30, 4), dtype=np.uint8), "RGBA")
    image = image if mode == "RGBA" else image.convert("RGB").convert(mode)
    if mode == "LA":
        image.putalpha(Image.fromarray(rng.integers(0, 256, (50, 30), dtype=np.uint8)))
    if mode == "P":
        image.info["transparency"] = 3
    expected = theirs.image_processor(image, do_convert_rgb=True, return_tensors="pt")["pixel_values"]
    assert torch.equal(ours.preprocess_images([image]), expected)


def test_arrays_and_tensors_are_the_same_image(ours: Processor) -> None:
    rng = np.random.default_rng(4)
    array = rng.integers(0, 256, (33, 45, 3), dtype=np.uint8)
    expected = ours.preprocess_images([Image.fromarray(array)])
    tensor = torch.from_numpy(array)
    same = [array, array / 255.0, (array / 255).astype(np.float32), tensor, tensor.permute(2, 0, 1)]
    same += [
        tensor.permute(2, 0, 1) / 255.0,
        array[::-1].copy()[::-1],
        np.dstack([array, np.full((33, 45), 255, np.uint8)]),
    ]
    for image in same:
        assert torch.equal(ours.preprocess_images([image]), expected)
    grey = array[..., 0]
    expected = ours.preprocess_images([Image.fromarray(grey)])
    for image in [grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None], grey / 255.0]:
        assert torch.equal(ours.preprocess_images([image]), expected)
    batch = np.stack([array, array[::-1]])
    assert ours(batch, ["a", "b"])["pixel_values"].shape == (2, 3, 28, 28)
    assert torch.equal(ours.preprocess_images([torch.ones(3, 4, 4, dtype=torch.bfloat16)]), torch.ones(1, 3, 28, 28))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"channels is expected, got \[4, 4, 2\]"),
        (np.zeros((4,), np.uint8), r"got \[4\]"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.full((4, 4, 3), 1.5), r"\[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"\[0, 1\]"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (Image.new("F", (3, 3)), "'F'"),
    ],
)
def test_bad_arrays_are_refused(ours: Processor, image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.preprocess_images([image])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="got int"):
        ours.preprocess_images([3])  # type: ignore[list-item]
    for tensor in (torch.zeros(3, 4, 4, device="meta"), torch.zeros(4, 4).to_sparse()):
        with pytest.raises(TypeError, match="images: a dense tensor is expected"):
            ours.preprocess_images([tensor])


def test_sixteen_bit_grey_keeps_its_range() -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    assert np.array_equal(np.asarray(load_image(Image.fromarray(ramp)))[..., 0], np.arange(256).reshape(16, 16))


def test_paths(ours: Processor, theirs: PaliGemmaProcessor, images: list[Image.Image], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    path = tmp_path / "turned.png"
    images[0].save(path, exif=exif)
    expected = theirs(images=str(path), text="<image>caption en", return_tensors="pt")
    for given in (path, str(path)):
        assert_same(ours(given, "caption en"), expected)
    assert torch.equal(
        expected["pixel_values"], ours.preprocess_images([images[0].transpose(Image.Transpose.ROTATE_270)])
    )


def test_unreadable_files_are_named(ours: Processor, images: list[Image.Image], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone.jpg"):
        ours(tmp_path / "gone.jpg", "a")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(OSError, match="text.jpg: not an image"):
        ours(tmp_path / "text.jpg", "a")
    for name in ("half.jpg", "half.png"):
        images[4].save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(OSError, match=f"{name}: cannot read the image"):
            ours(tmp_path / name, "a")
        with Image.open(tmp_path / name) as lazy, pytest.raises(OSError, match=f"{name}: cannot read the image"):
            ours(lazy, "a")


def test_large_images(ours: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (10_000, 10_000), 1).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ours(path, "a")["pixel_values"], torch.ones(1, 3, 28, 28))
    Image.new("1", (20_000, 10_000)).save(path)
    with pytest.raises(ValueError, match=f"large.png.*200000000.*{MAX_IMAGE_PIXELS}"):
        ours(path, "a")
    monkeypatch.setattr(images_module, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(ValueError, match="10×10 is 100 pixels; at most 99"):
        ours(Image.new("RGB", (10, 10)), "a")


def bilinear_weights(size: int, out: int, antialias: bool) -> np.ndarray:
    """Return tf.image.resize(method="bilinear") of rows as a matrix, computed from its definition."""
    scale = size / out
    support = max(scale, 1.0) if antialias else 1.0
    centres = (np.arange(out)[:, None] + 0.5) * scale - 0.5
    if not antialias:
        centres = centres.clip(0, size - 1)
    weights = np.maximum(0, 1 - np.abs(np.arange(size)[None] - centres) / support)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("mode", ["big_vision", "big_vision_no_antialias"])
@pytest.mark.parametrize("shape", [(97, 301), (11, 40), (1, 1)])
def test_big_vision_resize(folder: Path, mode: str, shape: tuple[int, int]) -> None:
    array = np.random.default_rng(5).integers(0, 256, (*shape, 3), dtype=np.uint8)
    rows, columns = (bilinear_weights(size, 28, mode == "big_vision") for size in shape)
    expected = np.einsum("yh,hwc,xw->cyx", rows, array.astype(np.float64), columns) / 127.5 - 1
    pixels = Processor.from_pretrained(folder, resize=mode).preprocess_images([array])
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels[0].numpy(), expected, atol=2e-5)


def test_bad_options_are_refused(ours: Processor) -> None:
    with pytest.raises(ValueError, match="resize: 'cubic'; allowed are 'hf'"):
        Processor(ours.tokenizer, image_size=28, num_image_tokens=4, resize="cubic")
    with pytest.raises(ValueError, match="num_image_tokens: 0"):
        Processor(ours.tokenizer, image_size=28, num_image_tokens=0)
    with pytest.raises(ValueError, match="image_mean"):
        Processor(ours.tokenizer, image_size=28, num_image_tokens=4, image_mean=(0.5,))


def test_an_image_token_of_the_model_that_the_tokenizer_lacks(ours: Processor, images: list[Image.Image]) -> None:
    processor = Processor(ours.tokenizer, image_size=28, num_image_tokens=4, image_token_id=4000)
    ids = processor(images[0], "<image>a")["input_ids"][0].tolist()
    assert ids[:4] == [4000] * 4 and ours.tokenizer.image_token_id not in ids
