"""Generation with CUDA graphs: tensors keep their addresses, and nothing reads a value on the device.

Without a GPU, a stand-in for a captured graph runs the function at each replay.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import pg_kernels
from pg_kernels import nn as pg_nn
from pg_kernels import quantize_
from pg_kernels.model import PaliGemma, PaliGemmaConfig, decoding, gemma, generation, graphs, siglip
from pg_kernels.model.config import TextConfig, VisionConfig
from pg_kernels.model.decoding import DecodingSession, SamplingConfig
from pg_kernels.model.grammar import TokenGrammar
from pg_kernels.nn import attention as nn_attention
from pg_kernels.nn import fusion as nn_fusion

VISION = VisionConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
)
TEXT = TextConfig(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=40,
    vocab_size=64,
)
SAMPLED: dict[str, Any] = {"temperature": 1.3, "top_k": 9, "top_p": 0.9}


def make(**text: Any) -> PaliGemma:
    torch.manual_seed(0)
    return PaliGemma(PaliGemmaConfig(VISION, TextConfig(**{**vars(TEXT), **text}))).eval()


def boxes() -> TokenGrammar:
    """Return a grammar of boxes for the small vocabulary: locations are 8 to 39, codes 40 to 47, text 48 to 59."""
    return TokenGrammar(torch.arange(8, 40), torch.arange(40, 48), torch.arange(48, 60), num_codes=0)


@pytest.fixture
def model() -> PaliGemma:
    return make()


def prompts(model: PaliGemma, batch: int = 2, text: int = 5, seed: int = 0, images: int = 1) -> dict[str, Tensor]:
    """Return images and random tokens. The first row has two padding tokens, before or after the tokens by the seed."""
    generator = torch.Generator().manual_seed(seed)
    placeholders = torch.full((batch, 4 * images), model.config.image_token_id)
    ids = torch.cat((placeholders, torch.randint(4, 64, (batch, text), generator=generator)), 1)
    mask = torch.ones_like(ids)
    if seed % 2:
        ids[0], mask[0, :2] = ids[0].roll(2), 0
        ids[0, :2] = 0
    else:
        ids[0, -2:] = mask[0, -2:] = 0
    pixels = torch.rand(batch * images, 3, 8, 8, generator=generator) * 2 - 1
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}


class Recorded:
    """A stand-in for a CUDA graph: it runs the function at each replay and not at the capture."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.replay = function
        self.shared: object = None

    def pool(self) -> object:
        return self.shared or self


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorded]]:
    """Replace all captures by stand-ins, which are listed."""
    found: list[Recorded] = []

    def capture(function: Callable[[], None], generator: torch.Generator | None, pool: object) -> Recorded:
        found.append(Recorded(function))
        found[-1].shared = pool
        return found[-1]

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(generation, "capture_unsupported_reason", lambda model, device: None)
    yield found


def seeded(seed: int | None) -> dict[str, Any]:
    return {} if seed is None else {**SAMPLED, "generator": torch.Generator().manual_seed(seed)}


@pytest.mark.parametrize("seed", [None, 3])
def test_replays_answer_as_eager_steps_do(model: PaliGemma, captured: list[Recorded], seed: int | None) -> None:
    """Prompts of several lengths and padding sides run in one session, one after the other."""
    options, eager = seeded(seed), seeded(seed)
    for text, number, new in ((5, 0, 9), (7, 1, 4), (5, 2, 12), (5, 4, 1), (7, 3, 9), (5, 6, 20)):
        given = prompts(model, text=text, seed=number)
        expected = model.generate(**given, max_new_tokens=new, cuda_graph=False, **eager)
        assert torch.equal(model.generate(**given, max_new_tokens=new, **options), expected)
    # One graph for the step, and one for each prefill shape seen twice.
    assert len(model.graph_cache) == 1 and len(captured) == 3


@pytest.mark.parametrize("seed", [None, 3])
def test_replays_score_and_follow_a_grammar_as_eager_steps_do(
    model: PaliGemma, captured: list[Recorded], seed: int | None
) -> None:
    grammar, options, eager = boxes(), seeded(seed), seeded(seed)
    for number, new in ((0, 9), (1, 4), (2, 12), (4, 1), (3, 9), (6, 20)):
        call = {**prompts(model, seed=number), "max_new_tokens": new, "grammar": grammar, "return_scores": True}
        expected = model.generate(**call, cuda_graph=False, **eager)
        replayed = model.generate(**call, **options)
        assert torch.equal(replayed.ids, expected.ids) and torch.equal(replayed.scores, expected.scores)
    assert len(model.graph_cache) == 1 and len(captured) == 2


def test_what_a_session_is_kept_for(model: PaliGemma, captured: list[Recorded]) -> None:
    def captures(**options: Any) -> int:
        before = len(captured)
        model.generate(**prompts(model, batch=options.pop("batch", 2)), max_new_tokens=5, eos_token_id=-1, **options)
        return len(captured) - before

    assert captures() == 1  # the step
    assert captures() == 1  # the prefill
    assert captures() == 0
    assert captures(batch=3) == 1
    assert captures(temperature=1.0) == 1
    generator = torch.Generator()
    assert captures(temperature=1.0, generator=generator) == 1
    assert captures(temperature=1.0, generator=generator) == 1
    # A session has its own generator, which copies the state of this one.
    assert captures(temperature=1.0, generator=torch.Generator()) == 0
    assert captures(temperature=1.0, top_k=3) == 1
    assert len(model.graph_cache) == graphs.KEPT
    assert captures() == 1  # the fifth session evicted the first
    with pg_kernels.backend("reference"):
        assert captures() == 1
    model.graph_cache.clear()
    assert len(model.graph_cache) == 0


def test_a_session_ends_with_the_model_it_was_captured_from(model: PaliGemma, captured: list[Recorded]) -> None:
    given = prompts(model)

    def answers_alike() -> int:
        """Return the number of captures for two answers."""
        before = len(captured)
        for _ in range(2):
            answer = model.generate(**given, max_new_tokens=6)
            assert torch.equal(answer, model.generate(**given, max_new_tokens=6, cuda_graph=False))
        return len(captured) - before

    assert answers_alike() == 2
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(1.5)  # the address is unchanged, because graphs read it
    assert answers_alike() == 0
    layer = model.model.language_model.layers[0].mlp
    layer.down_proj.weight = nn.Parameter(layer.down_proj.weight.detach().clone())
    assert answers_alike() == 2
    quantize_(model, skip=lambda name, layer: "vision" in name)
    assert answers_alike() == 2
    layer.down_proj.set_weight(torch.randn(16, 40))
    assert answers_alike() == 2


def test_after_an_error_a_session_is_not_used_again(model: PaliGemma, captured: list[Recorded]) -> None:
    given = prompts(model)
    model.generate(**given, max_new_tokens=6)

    def fail(token: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(**given, max_new_tokens=6, stream=fail)
    assert len(model.graph_cache) == 0
    expected = model.generate(**given, max_new_tokens=6, cuda_graph=False)
    assert torch.equal(model.generate(**given, max_new_tokens=6), expected)


def test_a_stream_may_generate(model: PaliGemma, captured: list[Recorded]) -> None:
    """A callback in the middle of an answer that generates again uses a session of its own."""
    given, other, inner = prompts(model), prompts(model, seed=1), []
    expected = [model.generate(**p, max_new_tokens=6, cuda_graph=False) for p in (given, other)]
    streamed: list[Tensor] = []

    def stream(token: Tensor) -> None:
        streamed.append(token)
        inner.append(model.generate(**other, max_new_tokens=6))

    assert torch.equal(model.generate(**given, max_new_tokens=6, stream=stream), expected[0])
    assert torch.equal(torch.stack(streamed, 1), expected[0])
    assert all(torch.equal(answer, expected[1]) for answer in inner)


def test_graphs_of_a_session_share_memory(model: PaliGemma, captured: list[Recorded]) -> None:
    for text in (4, 5, 4, 5):
        model.generate(**prompts(model, text=text), max_new_tokens=4)
    step, *prefills = captured
    assert step.shared is None and [graph.shared for graph in prefills] == [step, step]


@pytest.mark.parametrize("keeps", [False, True], ids=["step by step", "replayed"])
def test_memory_goes_with_whoever_held_it(
    keeps: bool, captured: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are freed at once. The garbage collector would run late: it counts objects, not gigabytes."""
    # Like a real graph, it keeps no reference to what it ran.
    graph = SimpleNamespace(replay=lambda: None, pool=lambda: None)
    monkeypatch.setattr(graphs, "capture", lambda *_: graph)
    gc.collect()
    gc.disable()
    try:
        model, caches = make(), []
        new_cache = PaliGemma.new_cache

        def watched(self: PaliGemma, *sizes: int) -> Any:
            cache = new_cache(self, *sizes)
            caches.append(weakref.ref(cache))
            return cache

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PaliGemma, "new_cache", watched)
            for _ in range(3):
                model.generate(**prompts(model), max_new_tokens=4, cuda_graph="auto" if keeps else False)
        assert [cache() is not None for cache in caches] == ([True] if keeps else [False] * 3)
        weight = weakref.ref(model.lm_head.weight)
        del model
        assert weight() is None and not any(cache() for cache in caches)
    finally:
        gc.enable()


def test_a_generator_goes_on_where_it_was(model: PaliGemma, captured: list[Recorded]) -> None:
    """The session's random numbers do not depend on other draws before or after."""
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for number in range(3):
        given = prompts(model, seed=number)
        expected = model.generate(**given, max_new_tokens=6, generator=theirs, cuda_graph=False, **SAMPLED)
        assert torch.equal(model.generate(**given, max_new_tokens=6, generator=ours, **SAMPLED), expected)
        assert torch.equal(torch.rand(2, generator=ours), torch.rand(2, generator=theirs))
    with pytest.raises(ValueError, match="^generator: expected one on cpu, as the model, got one on meta"):
        other = SimpleNamespace(device=torch.device("meta"))
        model.generate(**prompts(model), generator=other, **SAMPLED)


def test_copies_of_a_model_begin_anew(model: PaliGemma, captured: list[Recorded]) -> None:
    given = prompts(model)
    expected = model.generate(**given, max_new_tokens=6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(other.graph_cache) == 0
        assert torch.equal(other.generate(**given, max_new_tokens=6), expected)
    assert len(model.graph_cache) == 1
    assert not any("session" in name for name in model.state_dict())


def test_features_of_an_image_serve_several_prompts(model: PaliGemma, captured: list[Recorded]) -> None:
    given = prompts(model, images=2)
    features = model.get_image_features(given.pop("pixel_values")).detach()
    for seed in range(3):
        other = {**prompts(model, images=2, seed=2 * seed, text=4), "image_features": features}
        del other["pixel_values"]
        expected = model.generate(**other, max_new_tokens=6, cuda_graph=False)
        assert torch.equal(model.generate(**other, max_new_tokens=6), expected)
    assert len(captured) == 2


@pytest.mark.parametrize("ends_at", [1, 3, 8, 9, 11])
def test_answers_end_where_the_last_one_does(
    model: PaliGemma, captured: list[Recorded], monkeypatch: pytest.MonkeyPatch, ends_at: int
) -> None:
    """End tokens are found although the host looks only now and then. A step beyond the end leaves no trace."""
    given = prompts(model)
    free = model.generate(**given, max_new_tokens=12, eos_token_id=-1, cuda_graph=False)
    ends = sorted(set(free[:, ends_at - 1].tolist()))
    expected = model.generate(**given, max_new_tokens=12, eos_token_id=ends, cuda_graph=False)
    session = graphs.GraphedDecodingSession(model, 2, 128, SamplingConfig(tuple(ends), 0.0, None, None, False))
    with torch.inference_mode():
        for look in (2, 5, 8):
            monkeypatch.setattr(decoding, "_steps_between_checks", lambda device, hooks, look=look: look)
            assert torch.equal(session.answer(model, given, None, 12).ids, expected)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("options", [{}, SAMPLED, {"temperature": 0.7}], ids=["greedy", "nucleus", "drawn"])
@pytest.mark.parametrize("more", [False, True], ids=["", "scores and grammar"])
def test_a_step_looks_at_no_number(options: dict[str, Any], quantised: bool, more: bool) -> None:
    """Tensors without data raise when a value is read. On a GPU, reading a value would synchronise."""
    with FakeTensorMode(), torch.inference_mode():
        model = make(vocab_size=300)
        if quantised:
            quantize_(model)
        with pytest.raises(DataDependentOutputException):
            model.model.language_model.norm.weight.sum().item()
        sampling = SamplingConfig(
            (1, 2),
            options.get("temperature", 0.0),
            options.get("top_k"),
            options.get("top_p"),
            False,
            more,
            boxes() if more else None,
        )
        session = DecodingSession(model, 2, 128, sampling)
        holders = [session, session.decoder, session.decoder.lengths, *filter(None, [session._grammar])]
        state = [(holder, name, value) for holder in holders for name, value in vars(holder).items()]
        session.prefill(model, prompts(model))
        session.step(model)
        # All results are in the same tensors as before.
        assert all(getattr(holder, name) is value for holder, name, value in state if isinstance(value, Tensor))
        assert session._answers.shape == (2, 128) and session._answers.dtype == torch.int64


def test_where_there_can_be_no_graph(model: PaliGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prompts(model)
    with pytest.raises(ValueError, match=r"^cuda_graph: there can be none here: the model is on cpu"):
        model.generate(**given, cuda_graph=True)
    with pytest.raises(ValueError, match=r"^cuda_graph: there can be none here: beam search"):
        model.generate(**given, num_beams=2, cuda_graph=True)
    with pytest.raises(ValueError, match=r"^cuda_graph: there can be none here: the logits_processor runs on the host"):
        model.generate(**given, logits_processor=lambda answers, logits: logits, cuda_graph=True)
    for value in ("never", None, 2):
        with pytest.raises(ValueError, match=r"^cuda_graph: expected 'auto', True or False, got"):
            model.generate(**given, cuda_graph=value)
    device = torch.device("cuda")
    assert graphs.capture_unsupported_reason(model, device) is None
    hook = model.model.language_model.norm.register_forward_hook(lambda *_: None)
    assert (
        graphs.capture_unsupported_reason(model, device) == "a RMSNorm has a forward hook, which a graph would not call"
    )
    hook.remove()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
    assert str(graphs.capture_unsupported_reason(model, device)).startswith("autocast keeps casts of the weights only")
    monkeypatch.undo()

    class Adapter(nn.Linear):
        pass

    model.lm_head = Adapter(16, 64, bias=False)
    assert graphs.capture_unsupported_reason(model, device) == "there is a Adapter, of which a graph might miss changes"


def _separately(x: Tensor, layers: Any) -> tuple[Tensor, ...]:
    return tuple(layer(x) for layer in layers)


def _normed_after_adding(norm: Any, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x if added is None else x + added
    return norm(x), x


def _rotated_then_written(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_positions: Tensor,
    *,
    theta: float,
) -> Tensor:
    q, k = pg_kernels.apply_rotary(q, k, positions, theta=theta)
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache.scatter_(2, cache_positions[:, None, :, None].expand(new.shape), new.to(cache.dtype))
    return q


@pytest.mark.parametrize("model_type", ["gemma", "gemma2"])
def test_merged_projections(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both towers compute q, k and v by one product of the same parameters. Saving, copying, training, … are unchanged."""
    model = make(model_type=model_type)
    given, before = prompts(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, parameters = model.generate(**given, max_new_tokens=8, eos_token_id=-1), list(model.parameters())
    pg_nn.fuse_qkv_(model)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    for _ in range(2):  # the second call changes nothing
        addresses = [parameter.data_ptr() for parameter in parameters]
        pg_nn.fuse_qkv_(model)
        assert addresses == [parameter.data_ptr() for parameter in parameters]
    products: list[int] = []
    linear = nn_fusion.F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        products.append(len(weight))
        return linear(x, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(nn_fusion.F, "linear", counted)
        assert torch.equal(model.generate(**given, max_new_tokens=8, eos_token_id=-1), expected)
    # Query heads and twice the key-value heads of 16 columns; three times 32 columns in the image encoder.
    assert products.count(4 * 16 + 2 * 2 * 16) == 8 * TEXT.num_hidden_layers
    assert products.count(3 * 32) == VISION.num_hidden_layers

    model.save_pretrained(tmp_path)
    for other in (PaliGemma.from_pretrained(tmp_path), copy.deepcopy(model), model):
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, before[name])
    labels = torch.where(torch.arange(9) < 7, -100, given["input_ids"])
    model(**given, token_type_ids=(torch.arange(9) >= 7).long().expand(2, -1), labels=labels).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)
    assert model.to(torch.float64).generate(**given, max_new_tokens=8).dtype == torch.int64
    quantize_(model.float())
    assert model.generate(**given, max_new_tokens=8).shape[0] == 2


FUSIONS: dict[str, tuple[Any, str, Any]] = {
    "QKV": (nn_attention, "project", _separately),
    "QKV of the image encoder": (siglip, "project", _separately),
    "sum and norm": (gemma, "add_and_norm", _normed_after_adding),
    "sum and norm in the image encoder": (siglip, "add_and_norm", _normed_after_adding),
    "rotary and cache": (nn_attention, "apply_rotary_to_cache", _rotated_then_written),
    "gate and up": (
        pg_nn.GeGLUMLP,
        "forward",
        lambda self, x: self.down_proj(pg_kernels.geglu(self.gate_proj(x), self.up_proj(x))),
    ),
    "output head and choice": (PaliGemma, "topk_logits", lambda self, hidden, k: self.logits(hidden).topk(k)),
}


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("model_type", ["gemma", "gemma2"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_tokens_are_the_same_without_each_fusion(
    fusion: str, model_type: str, quantised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(model_type=model_type)
    if quantised:
        quantize_(model)
    given = prompts(model)
    expected = model.generate(**given, max_new_tokens=8, eos_token_id=-1)
    calls, (owner, name, unfused) = [], FUSIONS[fusion]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return unfused(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    assert torch.equal(model.generate(**given, max_new_tokens=8, eos_token_id=-1), expected)
    assert calls


def test_tokens_are_the_same_with_all_kernels() -> None:
    """Triton kernels, in the interpreter, agree with the definitions."""
    pytest.importorskip("triton")
    model = make(num_hidden_layers=1)
    given = prompts(model)
    with pg_kernels.backend("reference"):
        expected = model.generate(**given, max_new_tokens=3, eos_token_id=-1)
    # Ops without a Triton kernel have nothing to compare.
    assert torch.equal(model.generate(**given, max_new_tokens=3, eos_token_id=-1), expected)
    with pg_kernels.backend("triton"):
        assert torch.equal(model.generate(**given, max_new_tokens=3, eos_token_id=-1), expected)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_graphs_on_another_gpu_than_the_current_one() -> None:
    for device in ("cuda:1", "cuda:0"):
        model = make().to(device)
        given = {name: tensor.to(device) for name, tensor in prompts(model).items()}
        expected = model.generate(**given, max_new_tokens=6, cuda_graph=False)
        for _ in range(3):
            assert torch.equal(model.generate(**given, max_new_tokens=6), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
def test_graphs_on_a_gpu(quantised: bool, seed: int | None) -> None:
    model = make().to("cuda", torch.bfloat16)
    if quantised:
        quantize_(model)
    generators = [None if seed is None else torch.Generator("cuda").manual_seed(seed) for _ in range(2)]
    options = {} if seed is None else SAMPLED
    for text, number, new in ((5, 0, 9), (7, 1, 4), (5, 2, 12), (7, 3, 9), (5, 4, 20)):
        given = {name: tensor.to("cuda") for name, tensor in prompts(model, text=text, seed=number).items()}
        expected, answer = (
            model.generate(**given, max_new_tokens=new, cuda_graph=graph, generator=generator, **options)
            for graph, generator in zip((False, True), generators, strict=True)
        )
        assert torch.equal(answer, expected)
    assert len(model.graph_cache) == 1
