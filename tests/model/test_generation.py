"""Decoding with the cache, against the model's own forward without one."""

from __future__ import annotations

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
    """Greedy decoding of one prompt by running everything anew at each step."""
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
    """20,000 first tokens against softmax(logits / temperature) restricted to the nucleus and the k likeliest."""
    from pg_kernels.model.generation import Choice, _choose

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
        choice, generator = Choice((), 0.7, seeded=True, **options), torch.Generator().manual_seed(1)
        draws = _choose(model, hidden, choice, generator)
        expected = torch.zeros(12).index_copy(0, kept, probabilities[kept] / probabilities[kept].sum())
        observed = torch.bincount(draws, minlength=12) / 20_000
        # Five standard deviations of a binomial share, at most 0.018.
        assert ((observed - expected).abs() <= 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_one_beam_more_never_scores_less(model: PaliGemma) -> None:
    """With beams for every sequence, beam search finds the likeliest answer of all; greedy is not better."""
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
    ],
)
def test_bad_options_are_refused(model: PaliGemma, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts(), **options)
