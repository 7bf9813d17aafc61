"""Decoding with the cache, compared with the model's forward without a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pg_kernels.model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig

VISION = VisionConfig(24, 40, 1, 2, image_size=28)
TEXT = TextConfig("gemma2", 64, 32, 48, 2, 4, 2, 8, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
IMAGE, IMAGE_TOKENS = 64, 4  # beyond the vocabulary, so that no answer contains it


@pytest.fixture(scope="module")
def model() -> PaliGemma:
    torch.manual_seed(0)
    return PaliGemma(PaliGemmaConfig(VISION, TEXT, image_token_id=IMAGE)).eval()


def prompts(padding_side: str = "left") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows = [
        torch.cat([torch.full((IMAGE_TOKENS,), IMAGE), torch.randint(3, 60, (n,), generator=generator)])
        for n in (2, 6, 4)
    ]
    longest = max(map(len, rows))
    pads = [(longest - len(r), 0) if padding_side == "left" else (0, longest - len(r)) for r in rows]
    return {
        "input_ids": torch.stack([torch.nn.functional.pad(r, p) for r, p in zip(rows, pads, strict=True)]),
        "attention_mask": torch.stack(
            [torch.nn.functional.pad(torch.ones_like(r), p) for r, p in zip(rows, pads, strict=True)]
        ),
        "pixel_values": torch.rand(3, 3, 28, 28, generator=generator) * 2 - 1,
    }


def row(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    valid = inputs["attention_mask"][index].bool()
    return {
        "input_ids": inputs["input_ids"][index : index + 1, valid],
        "pixel_values": inputs["pixel_values"][index : index + 1],
    }


@torch.no_grad()
def without_cache(model: PaliGemma, inputs: dict[str, Tensor], steps: int) -> Tensor:
    """Decode one prompt greedily by recomputing everything at each step."""
    ids = inputs["input_ids"]
    for _ in range(steps):
        types = (torch.arange(ids.shape[1]) >= inputs["input_ids"].shape[1]).long()[None]
        logits = model(ids, inputs["pixel_values"], token_type_ids=types, logits_to_keep=1).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_cache_and_padding_change_nothing(model: PaliGemma, padding_side: str) -> None:
    inputs = prompts(padding_side)
    tokens = model.generate(**inputs, max_new_tokens=10, eos_token_id=99)
    for index in range(3):
        assert torch.equal(tokens[index : index + 1], without_cache(model, row(inputs, index), 10))


def test_rows_end_by_themselves_and_the_batch_early(model: PaliGemma) -> None:
    inputs = prompts()
    free = model.generate(**inputs, max_new_tokens=12, eos_token_id=99)
    ends = [int(free[0, 2]), int(free[1, 1]), int(free[2, 4])]
    tokens = model.generate(**inputs, max_new_tokens=12, eos_token_id=ends)
    lengths = []
    for index in range(3):
        stop = next(i for i, token in enumerate(free[index].tolist()) if token in ends) + 1
        lengths.append(stop)
        assert torch.equal(tokens[index, :stop], free[index, :stop])
        assert (tokens[index, stop:] == 0).all()
    assert tokens.shape == (3, max(lengths))


def test_stream_gives_the_same_tokens(model: PaliGemma) -> None:
    seen: list[Tensor] = []
    tokens = model.generate(**prompts(), max_new_tokens=5, stream=seen.append)
    assert torch.equal(torch.stack(seen, 1), tokens)


def test_autocast(model: PaliGemma) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.generate(**prompts(), max_new_tokens=5)
    assert tokens.shape == (3, 5)


def test_image_features_are_reusable(model: PaliGemma) -> None:
    inputs = prompts()
    expected = model.generate(**inputs, max_new_tokens=5)
    features = model.get_image_features(inputs.pop("pixel_values"))
    assert torch.equal(model.generate(**inputs, image_features=features, max_new_tokens=5), expected)


def test_draws_follow_the_seed(model: PaliGemma) -> None:
    def draw(seed: int, **options) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(**prompts(), max_new_tokens=12, temperature=1.5, generator=generator, **options)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    greedy = model.generate(**prompts(), max_new_tokens=12)
    assert torch.equal(draw(0, top_k=1), greedy)
    assert torch.equal(draw(0, top_p=1e-6), greedy)


def test_draws_follow_the_distribution(model: PaliGemma) -> None:
    """20,000 first tokens follow softmax(logits / temperature), restricted to the nucleus and the top k."""
    from pg_kernels.model.decoding import SamplingConfig, choose_tokens

    model = PaliGemma(PaliGemmaConfig(VISION, TextConfig(vocab_size=12, hidden_size=4, num_hidden_layers=1)))
    torch.manual_seed(0)
    hidden = torch.randn(1, 4).expand(20_000, -1)
    logits = model.logits(hidden[:1]).detach()
    probabilities = (logits / 0.7).softmax(-1)[0]
    order = probabilities.argsort(descending=True)
    for options, kept in (
        ({"top_k": None, "top_p": None}, order),
        ({"top_k": 3, "top_p": None}, order[:3]),
        ({"top_k": None, "top_p": 0.8}, order[: int((probabilities[order].cumsum(0) < 0.8).sum()) + 1]),
    ):
        sampling, generator = SamplingConfig((), 0.7, seeded=True, **options), torch.Generator().manual_seed(1)
        draws, _ = choose_tokens(model, hidden, sampling, generator)
        expected = torch.zeros(12).index_copy(0, kept, probabilities[kept] / probabilities[kept].sum())
        observed = torch.bincount(draws, minlength=12) / 20_000
        # Five standard deviations of a binomial share, at most 0.018.
        assert ((observed - expected).abs() <= 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_one_beam_more_never_scores_less(model: PaliGemma) -> None:
    """With a beam for every sequence, beam search finds the most likely answer of all. Greedy decoding is not better."""
    inputs, end = row(prompts(), 1), 5

    def score(tokens: Tensor) -> float:
        ids = torch.cat([inputs["input_ids"], tokens], 1)
        types = (torch.arange(ids.shape[1]) >= inputs["input_ids"].shape[1]).long()[None]
        with torch.no_grad():
            logits = model(ids, inputs["pixel_values"], token_type_ids=types).logits[0].log_softmax(-1)
        start = inputs["input_ids"].shape[1] - 1
        return sum(float(logits[start + i, token]) for i, token in enumerate(tokens[0].tolist()))

    best = model.generate(**inputs, max_new_tokens=2, eos_token_id=end, num_beams=64)
    alternatives = [[end]] + [[token, end] for token in range(64) if token != end]
    scores = [score(torch.tensor([tokens])) for tokens in alternatives]
    assert score(best) == pytest.approx(max(scores), abs=1e-4)


def test_beams_of_a_batch_are_those_of_its_rows(model: PaliGemma) -> None:
    for side in ("left", "right"):
        inputs = prompts(side)
        together = model.generate(**inputs, max_new_tokens=6, eos_token_id=[5, 9], num_beams=3)
        for index in range(3):
            alone = model.generate(**row(inputs, index), max_new_tokens=6, eos_token_id=[5, 9], num_beams=3)
            assert torch.equal(together[index, : alone.shape[1]], alone[0])
            assert (together[index, alone.shape[1] :] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 9000}, "max_new_tokens: 10 prompt tokens and 9000 .* 8192 positions"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"top_p": 0.9}, "temperature above 0"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ({"temperature": 10**400}, "temperature: .* is too large"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p"),
        ({"eos_token_id": []}, "eos_token_id: expected one token id or several"),
        ({"eos_token_id": 2**70}, "eos_token_id: expected one token id or several"),
        (
            {"eos_token_id": [-1, 64], "num_beams": 2},
            r"eos_token_id: beam search needs one in \[0, 64\), got \(-1, 64\)",
        ),
        ({"cuda_graph": 1}, "cuda_graph"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, r"input_ids: .* at least one token, got \[2, 0\]"),
        ({"input_ids": torch.zeros(0, 5, dtype=torch.int64)}, r"input_ids: .* at least one token, got \[0, 5\]"),
        ({"input_ids": torch.zeros(5, dtype=torch.int64)}, r"input_ids: .* got \[5\]"),
    ],
)
def test_bad_options_are_refused(model: PaliGemma, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts() | options)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [None, 3.0, "3", True, [3]]),
        ("num_beams", [None, 2.0, True]),
        ("temperature", [None, "1", True, 1j]),
        ("top_k", [3.5, "3", True]),
        ("top_p", ["1", True, [0.5]]),
        ("eos_token_id", ["1", 1.5, True, [1, None], {1}, [[1]], {"a": 1}]),
        ("stream", [3, "print"]),
        ("generator", [0, "cpu"]),
        ("input_ids", [None, [[1, 2]], torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)]),
        ("pixel_values", [3, torch.zeros(3, 3, 28, 28, dtype=torch.uint8)]),
        ("attention_mask", [[[1]]]),
        ("token_type_ids", ["0"]),
        ("image_features", [3]),
    ],
)
def test_wrong_types_are_named(model: PaliGemma, name: str, values: list) -> None:
    for value in values:
        options: dict[str, Any] = {"temperature": 1.0} if name in ("top_k", "top_p") else {}
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            model.generate(**prompts() | options | {name: value})


def test_integers_of_any_library(model: PaliGemma) -> None:
    expected = model.generate(**prompts(), max_new_tokens=4, eos_token_id=[5, 9])
    for ends in (torch.tensor([5, 9]), torch.tensor([5, 9]).numpy(), (5, torch.tensor(9))):
        assert torch.equal(model.generate(**prompts(), max_new_tokens=torch.tensor(4), eos_token_id=ends), expected)


def test_an_empty_batch_is_refused_by_the_forward(model: PaliGemma) -> None:
    for shape in ((2, 0), (0, 5)):
        with pytest.raises(ValueError, match="input_ids: .* at least one token"):
            model(torch.zeros(shape, dtype=torch.int64))


def test_a_beam_cannot_end_outside_the_vocabulary(model: PaliGemma) -> None:
    expected = model.generate(**prompts(), max_new_tokens=6, eos_token_id=5, num_beams=3)
    assert torch.equal(model.generate(**prompts(), max_new_tokens=6, eos_token_id=[-1, 5, 64], num_beams=3), expected)


def test_answers_end_where_generation_config_says(model: PaliGemma, tmp_path: Path) -> None:
    """generation_config.json ends answers as in transformers, also after saving. config.json's token is the fallback."""
    from transformers import PaliGemmaForConditionalGeneration

    torch.manual_seed(3)
    own = PaliGemma(PaliGemmaConfig(VISION, TEXT, image_token_id=63, tie_word_embeddings=False)).eval()
    inputs = row(prompts(), 1)
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = 63
    free = own.generate(**inputs, max_new_tokens=12, eos_token_id=-1)
    first, later = int(free[0, 0]), next(int(token) for token in free[0, 1:] if token != free[0, 0])
    stop = free[0].tolist().index(later) + 1
    own.save_pretrained(tmp_path)
    path, again = tmp_path / "generation_config.json", tmp_path / "again"
    for ends, length in (([1, later], stop), (later, stop), ([later, first], 1), (None, 12), (1, 12)):
        path.write_text(json.dumps({"eos_token_id": ends, "pad_token_id": 0}))
        loaded = PaliGemma.from_pretrained(tmp_path)
        loaded.save_pretrained(again)
        for folder, ours in ((tmp_path, loaded), (again, PaliGemma.from_pretrained(again))):
            theirs = PaliGemmaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
            types = torch.zeros_like(inputs["input_ids"])
            tokens = theirs.generate(**inputs, token_type_ids=types, max_new_tokens=12, do_sample=False)
            assert torch.equal(ours.generate(**inputs, max_new_tokens=12), tokens[:, types.shape[1] :])
            assert torch.equal(tokens[:, types.shape[1] :], free[:, :length])
        assert json.loads((again / "generation_config.json").read_text())["eos_token_id"] == (ends or 1)
    path.write_text("{}")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, later]}))
    assert torch.equal(PaliGemma.from_pretrained(tmp_path).generate(**inputs, max_new_tokens=12), free[:, :stop])


@pytest.mark.parametrize("value", ["1", 1.0, True, [], [1, None], [[1]], {}, -1, 2**40, float("nan")])
def test_other_end_tokens_are_refused(model: PaliGemma, tmp_path: Path, value: object) -> None:
    model.save_pretrained(tmp_path)
    for name in ("generation_config.json", "config.json"):
        path = tmp_path / name
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {"eos_token_id": value}))
        with pytest.raises(ValueError, match=f"{name}: .*eos_token_id: expected a token id or a list of them"):
            PaliGemma.from_pretrained(tmp_path)
        path.write_text(before)
