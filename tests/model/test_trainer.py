"""The training loop on a tiny random model, with data that are tensors."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pg_kernels.model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig
from pg_kernels.model.training import parallel
from pg_kernels.model.training.trainer import (
    Recipe,
    checkpointed_layers,
    learning_rate_factor,
    read,
    suffix_loss,
    train,
)

IMAGE_TOKENS = 4
CONFIG = PaliGemmaConfig(
    VisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28),
    TextConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=40,
    ),
    image_token_id=39,
)


def new_model(seed: int = 0) -> PaliGemma:
    torch.manual_seed(seed)
    return PaliGemma(CONFIG)


class Sums(Dataset[dict[str, Tensor]]):
    """Return an image of one brightness, a random prompt, and one to three tokens that name the brightness."""

    def __init__(self, length: int = 24) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        shade = int(torch.randint(4, (1,), generator=generator))
        count = 1 + index % 3
        text = torch.cat((torch.randint(3, 20, (2,), generator=generator), torch.full((count,), 20 + shade)))
        ids = torch.nn.functional.pad(torch.cat((torch.full((IMAGE_TOKENS,), 39), text)), (0, 3 - count))
        mask = torch.arange(len(ids)) < IMAGE_TOKENS + 2 + count
        types = mask & (torch.arange(len(ids)) >= IMAGE_TOKENS + 2)
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "token_type_ids": types.long(),
            "labels": ids.masked_fill(~types, -100),
            "pixel_values": torch.full((3, 28, 28), shade / 2 - 0.75),
        }


class InOrder(Sums):
    shuffle = False


class Batches(InOrder):
    """Return whole micro batches of 4 of the same examples."""

    def __len__(self) -> int:
        return self.length // 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return collate([super(Batches, self).__getitem__(i) for i in range(4 * index, 4 * index + 4)])


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


RECIPE = Recipe(steps=6, batch_size=8, learning_rate=1e-2, save_every=2, workers=0, seed=3)


def run(folder: Path, recipe: Recipe = RECIPE, data: Dataset[Any] | None = None, **options: Any) -> dict[str, Tensor]:
    """Train a new model and return its weights."""
    model = options.pop("model", None) or new_model()
    saved = []
    options.setdefault("collate", collate)
    train(model, Sums() if data is None else data, recipe, folder, save=lambda: saved.append(1), **options)
    assert saved == [1]
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def log(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[..., Tensor]:
    """Return a loss that raises in a step (from 1)."""
    calls = []

    def loss(model: torch.nn.Module, batch: dict[str, Tensor], recipe: Recipe) -> Tensor:
        calls.append(1)
        if len(calls) == step:
            raise Stop
        return suffix_loss(model, batch, recipe)

    return loss


def test_schedules() -> None:
    recipe = Recipe(steps=100, warmup=0.1)
    for schedule in ("cosine", "linear", "rsqrt"):
        factors = [learning_rate_factor(step, 100, replace(recipe, schedule=schedule)) for step in range(100)]
        assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert factors[9:] == sorted(factors[9:], reverse=True)
        middle = {"cosine": 0.5, "linear": 0.5, "rsqrt": math.sqrt(10 / 56)}[schedule]
        assert factors[55] == pytest.approx(middle)
        assert factors[99] == pytest.approx(
            {"cosine": 3.05e-4, "linear": 1 / 90, "rsqrt": math.sqrt(0.1)}[schedule], rel=1e-2
        )


def test_a_run_learns_and_logs(tmp_path: Path) -> None:
    run(tmp_path, replace(RECIPE, steps=20))
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert all(line["gradient_norm"] > 0 and line["examples_per_second"] > 0 for line in lines)
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("reduction", ["example", "token"])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path, reduction: str) -> None:
    recipe = replace(RECIPE, loss_reduction=reduction, steps=3)
    whole = run(tmp_path / "whole", recipe)
    parts = run(tmp_path / "parts", replace(recipe, micro_batch=2))
    for name in whole:
        if not name.endswith("k_proj.bias"):  # its gradient is zero up to rounding, which Adam turns into steps
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-4)
    for one, other in zip(log(tmp_path / "whole"), log(tmp_path / "parts"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)


def test_frozen_parts_stay(tmp_path: Path) -> None:
    before = new_model().state_dict()
    after = run(tmp_path, replace(RECIPE, frozen=("vision_tower", "layers.1")))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = {name for name in before if "vision_tower" in name or ".layers.1." in name}
    assert changed == set(before) - frozen


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen: the model has no part 'vision'; it has .*vision_tower"):
        run(tmp_path, replace(RECIPE, frozen=("vision",)))


@pytest.mark.parametrize(
    "options", [{}, {"precision": "bfloat16", "optimizer": "muon"}, {"workers": 2, "micro_batch": 4}]
)
def test_a_run_that_was_cut_off_ends_at_the_same_weights(tmp_path: Path, options: dict[str, Any]) -> None:
    recipe = replace(RECIPE, **options)
    whole = run(tmp_path / "whole", recipe)
    parts = recipe.batch_size // (recipe.micro_batch or recipe.batch_size)
    with pytest.raises(Stop):
        run(tmp_path / "cut", recipe, loss=stop_at(4 * parts))
    assert [line["step"] for line in log(tmp_path / "cut")] == [1, 2, 3]
    resumed = run(tmp_path / "cut", recipe, model=new_model(seed=1))  # loading replaces these weights
    assert_equal(whole, resumed)
    same = ("step", "loss", "gradient_norm", "learning_rate")
    for one, other in zip(log(tmp_path / "whole"), log(tmp_path / "cut"), strict=True):
        assert [one[key] for key in same] == [other[key] for key in same]


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    """Kill the process in the middle of a step while workers are alive."""
    recipe = replace(RECIPE, workers=2, precision="bfloat16")

    def killing(model: torch.nn.Module, batch: dict[str, Tensor], recipe: Recipe) -> Tensor:
        if (tmp_path / "cut/checkpoint.safetensors").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return suffix_loss(model, batch, recipe)

    process = multiprocessing.get_context("fork").Process(
        target=run, args=(tmp_path / "cut", recipe), kwargs={"loss": killing}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [line["step"] for line in log(tmp_path / "cut")] == [1, 2]
    assert_equal(run(tmp_path / "whole", recipe), run(tmp_path / "cut", recipe, model=new_model(seed=1)))


def evaluation(model: PaliGemma) -> Callable[[], dict[str, float]]:
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate([Sums()[i] for i in range(5)]).items()}
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}

    def evaluate() -> dict[str, float]:
        ids = model.generate(**prompt, max_new_tokens=3)
        return {"loss": float(model(**batch).loss), "ids": float(ids.sum())}

    return evaluate


def train_as_a_rank(rank: int, port: int, folder: Path, recipe: Recipe, cut: int) -> None:
    """Run one of two processes; the first writes the weights. `cut`: the loss call in which it dies, or 0."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    parallel.start(torch.device("cpu"))
    model = new_model()
    options = {"loss": stop_at(cut)} if cut else {}
    with suppress(Stop):
        train(
            model,
            Sums(),
            recipe,
            folder,
            collate=collate,
            evaluate=evaluation(model),
            save=lambda: torch.save(model.state_dict(), folder / "weights.pt"),
            **options,
        )
    parallel.stop()


def run_two_processes(folder: Path, recipe: Recipe, cut: int = 0) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=train_as_a_rank, args=(rank, port, folder, recipe, cut)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_processes_do_what_one_does(tmp_path: Path, precision: str) -> None:
    """Two processes train like one: resumed, with a tied embedding, a frozen part, and answers generated during training."""
    recipe = replace(
        RECIPE,
        steps=4,
        loss_reduction="token",
        micro_batch=2,
        frozen=("vision_tower",),
        patience=5,
        eval_every=2,
        precision=precision,
    )
    model = new_model()
    one = run(tmp_path / "one", recipe, model=model, evaluate=evaluation(model))
    run_two_processes(tmp_path / "two", recipe, cut=6)  # in the third step
    assert [line["step"] for line in log(tmp_path / "two")] == [1, 2]
    run_two_processes(tmp_path / "two", recipe)
    two = torch.load(tmp_path / "two/weights.pt")
    close = {"rtol": 1e-5, "atol": 1e-6} if precision == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    for kind in ("train", "evaluation"):
        lines, others = log(tmp_path / "one", kind), log(tmp_path / "two", kind)
        assert len(lines) == len(others) > 2
        for line, other in zip(lines, others, strict=True):
            assert other["loss"] == pytest.approx(line["loss"], rel=close["rtol"])
    assert set(two) == set(one)
    assert two["lm_head.weight"].data_ptr() == two["model.language_model.embed_tokens.weight"].data_ptr()
    for name in one:
        assert two[name].dtype == one[name].dtype
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4 if precision == "float32" else 3e-2)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(tmp_path, loss=stop_at(3))
    with pytest.raises(ValueError, match="of another run: learning_rate was 0.01, is 0.02"):
        run(tmp_path, replace(RECIPE, learning_rate=0.02))
    with pytest.raises(ValueError, match="the data are other ones"):
        run(tmp_path, data=Sums(25))
    with pytest.raises(ValueError, match="base was None, is big"):
        run(tmp_path, settings={"base": "big"})
    fresh = run(tmp_path, replace(RECIPE, learning_rate=0.02), restart=True)
    assert_equal(fresh, run(tmp_path / "other", replace(RECIPE, learning_rate=0.02)))


def test_data_read_in_order_are_read_once_from_where_they_are_needed(tmp_path: Path) -> None:
    seen = []

    class Watched(InOrder):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            seen.append(index)
            return super().__getitem__(index)

    list(read(Watched(), replace(RECIPE, steps=3), collate, range(1, 3), torch.device("cpu")))
    assert seen == list(range(8, 24))
    with pytest.raises(ValueError, match="4 steps of 8 examples are wanted, but there are 24"):
        run(tmp_path, replace(RECIPE, steps=4), data=InOrder())


def test_whole_batches_are_taken_as_they_come(tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=3, micro_batch=4)
    assert_equal(
        run(tmp_path / "whole", recipe, data=Batches(), collate=None), run(tmp_path / "single", recipe, data=InOrder())
    )


def test_every_epoch_has_each_example_once_in_another_order() -> None:
    batches = read(Sums(10), replace(RECIPE, batch_size=5), collate, range(4), torch.device("cpu"))
    rows = torch.cat([batch["input_ids"] for step in batches for batch in step])
    first, second = rows[:10], rows[10:]
    assert torch.equal(first.unique(dim=0), second.unique(dim=0))
    assert len(first.unique(dim=0)) == 10 and not torch.equal(first, second)


def test_bfloat16_moves_fp32_masters(tmp_path: Path) -> None:
    """Steps below bf16's resolution add up in the master weights. In bf16 weights they would be lost."""
    recipe = replace(RECIPE, learning_rate=1e-5, steps=12, schedule="linear", warmup=0.0)
    before = new_model().state_dict()
    exact = run(tmp_path / "fp32", recipe)
    rounded = run(tmp_path / "bf16", replace(recipe, precision="bfloat16", save_every=12), loss=suffix_loss)
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    moved = sum(int((rounded[name] != before[name].bfloat16()).sum()) for name in before)
    expected = sum(int((exact[name].bfloat16() != before[name].bfloat16()).sum()) for name in before)
    assert moved == pytest.approx(expected, rel=0.2) and moved > 50


def test_bfloat16_learns(tmp_path: Path) -> None:
    run(tmp_path, replace(RECIPE, steps=20, precision="bfloat16"))
    lines = log(tmp_path)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]


def test_muon_moves_matrices_by_orthogonal_steps(tmp_path: Path) -> None:
    before = new_model().state_dict()
    recipe = replace(RECIPE, optimizer="muon", steps=1, warmup=0.0, clip=math.inf)
    after = run(tmp_path / "muon", recipe)
    plain = run(tmp_path / "adamw", replace(recipe, optimizer="adamw"))
    differ = {name for name in before if not torch.equal(after[name], plain[name])}
    assert differ == {
        name for name in before if before[name].dim() == 2 and "embed" not in name and "lm_head" not in name
    }
    step = before["model.multi_modal_projector.linear.weight"] - after["model.multi_modal_projector.linear.weight"]
    values = torch.linalg.svdvals(step / (RECIPE.learning_rate * 0.2 * math.sqrt(16)))
    assert values.median() > 0.5 and values.max() < 1.3  # five iterations leave small singular values small
    run(tmp_path / "learns", replace(RECIPE, optimizer="muon", steps=20))
    lines = log(tmp_path / "learns")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]


def test_loss_options_reach_the_model() -> None:
    model, batch = new_model(), collate([Sums()[i] for i in range(3)])
    plain = suffix_loss(model, batch, RECIPE)
    assert plain == model(**batch, loss_reduction="example").loss
    assert suffix_loss(model, batch, replace(RECIPE, loss_reduction="token")) == model(**batch).loss
    smoothed = suffix_loss(model, batch, replace(RECIPE, label_smoothing=0.3))
    assert smoothed == model(**batch, loss_reduction="example", label_smoothing=0.3).loss != plain


def test_an_image_shared_by_questions_is_encoded_once() -> None:
    model, batch = new_model(), collate([Sums()[i] for i in (0, 1, 2)])
    index = torch.tensor([1, 0, 1])
    repeated = {**batch, "pixel_values": batch["pixel_values"][index]}
    shared = {**batch, "pixel_values": batch["pixel_values"][:2], "image_index": index}
    torch.testing.assert_close(suffix_loss(model, shared, RECIPE), suffix_loss(model, repeated, RECIPE))


def test_checkpointed_layers_have_the_same_gradients_and_are_undone(tmp_path: Path) -> None:
    model, batch = new_model(), collate([Sums()[i] for i in range(3)])
    kept: list[int] = []
    gradients = []
    for checkpointing in (False, True):
        size = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.numel()
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if checkpointing:
                with checkpointed_layers(model):
                    loss = suffix_loss(model, batch, RECIPE)
                    kept.append(size)
                    loss.backward()
            else:
                loss = suffix_loss(model, batch, RECIPE)
                kept.append(size)
                loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert kept[1] < 0.5 * kept[0]
    assert not any("forward" in vars(module) for module in model.modules())
    run(tmp_path, replace(RECIPE, gradient_checkpointing=True, steps=2))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    calls = []

    def loss(model: torch.nn.Module, batch: dict[str, Tensor], recipe: Recipe) -> Tensor:
        calls.append(1)
        return suffix_loss(model, batch, recipe) * (math.nan if len(calls) == 4 else 1.0)

    with pytest.raises(RuntimeError, match="step 4: the loss is nan"):
        run(tmp_path, loss=loss)
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert_equal(run(tmp_path), run(tmp_path / "whole"))


def test_patience_stops_and_keeps_the_best_weights(tmp_path: Path) -> None:
    losses = iter([4.0, 3.0, 1.0, 2.0, 2.5, 0.0])
    model, best = new_model(), []

    def evaluate() -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        best.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
        return {"loss": next(losses)}

    weights = run(tmp_path, replace(RECIPE, eval_every=1, patience=2), model=model, evaluate=evaluate)
    assert [line["loss"] for line in log(tmp_path, "evaluation")] == [4.0, 3.0, 1.0, 2.0, 2.5]
    assert_equal(weights, best[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl"]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, replace(RECIPE, steps=2), tensorboard=True, evaluate=lambda: {"loss": 0.5})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        [line["loss"] for line in log(tmp_path)]
    )
    assert [event.step for event in events.Scalars("evaluation/loss")] == [0, 2]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu(tmp_path: Path, precision: str) -> None:
    """A run that generates answers by CUDA graphs can be stopped and resumed."""
    recipe = replace(RECIPE, steps=40, eval_every=10, save_every=10, micro_batch=4, precision=precision, workers=1)
    for loss in (stop_at(2 * 35), suffix_loss):
        model = new_model().to("cuda")
        with suppress(Stop):
            run(tmp_path, recipe, model=model, evaluate=evaluation(model), loss=loss)
    first, *_, last = log(tmp_path)
    assert last["step"] == 40 and last["loss"] < 0.5 * first["loss"]
    assert [line["step"] for line in log(tmp_path, "evaluation")] == [0, 10, 20, 30, 40]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": None}, "steps and epochs: give one"),
        ({"epochs": 1.0}, "steps and epochs: give one"),
        ({"micro_batch": 3}, "micro_batch: 3 does not divide the batch_size 8"),
        ({"schedule": "flat"}, "schedule: 'flat'; allowed are cosine, linear, rsqrt"),
        ({"learning_rate": -1.0}, "learning_rate: expected at least 0, got -1.0"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected to lie in"),
        ({"save_every": 0}, "save_every: expected more than 0, got 0"),
    ],
)
def test_impossible_recipes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **options)
