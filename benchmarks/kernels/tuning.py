"""Every launch whose tiles can be chosen: the models' shapes, the candidate tiles, and a call that launches the kernel.

`pg-kernels tune` times the candidates on a GPU; `python -m benchmarks resources` compiles them for GPUs that are absent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import pg_kernels
from pg_kernels import backend
from pg_kernels.benchmarks.measure.machine import versions
from pg_kernels.benchmarks.measure.timing import Effort, TimedCall, interleave
from pg_kernels.benchmarks.report.text import duration
from pg_kernels.model.files import json_bytes, read_json_object, write_atomically
from pg_kernels.ops._common import devices
from pg_kernels.ops._common.devices import Device
from pg_kernels.ops.apply_rotary import tiles as rotary_tiles
from pg_kernels.ops.geglu import tiles as geglu_tiles
from pg_kernels.ops.geglu_mlp import tiles as mlp_tiles
from pg_kernels.ops.int8_linear import launch as int8_launch
from pg_kernels.ops.int8_linear import tiles as int8_tiles
from pg_kernels.ops.int8_linear.product import Int8Product
from pg_kernels.ops.layer_norm import tiles as layer_norm_tiles
from pg_kernels.ops.linear_cross_entropy import tiles as loss_tiles
from pg_kernels.ops.prefix_lm_attention import tiles as attention_tiles
from pg_kernels.ops.rms_norm import tiles as rms_norm_tiles

OPS = (
    "rms_norm",
    "layer_norm",
    "apply_rotary",
    "geglu",
    "geglu_mlp",
    "int8_linear",
    "linear_cross_entropy",
    "prefix_lm_attention",
)
WIDTHS = (2048, 2304, 3584, 4608)
"""Hidden sizes of PaliGemma 1 and 2. `MLP_WIDTHS` maps each to its MLP's hidden size."""
MLP_WIDTHS = {2048: 16384, 2304: 9216, 3584: 14336, 4608: 36864}
SMALLEST_GAIN = 0.02
"""The relative time that a candidate must save to replace the default tiles. Smaller differences are noise."""


@dataclass(frozen=True)
class Site:
    """A launch whose tiles can be chosen."""

    op: str
    key: str
    candidates: Sequence[Any]
    prepare: Callable[[], Callable[[], object]]
    """Draw the inputs and return a call that launches the kernel."""


@dataclass(frozen=True)
class Place:
    """Device and scale of the inputs. `small` shrinks all sizes that the choice of tiles does not depend on."""

    device: torch.device
    tiles_for: Device
    dtype: torch.dtype
    small: bool = False

    def draw(self, *shape: int, grad: bool = False) -> Tensor:
        """Return normal random numbers of the scale of activations and weights."""
        return (torch.randn(shape, device=self.device, dtype=self.dtype) / 16).requires_grad_(grad)

    def size(self, full: int, small: int = 16) -> int:
        """Return `full`, or `small` for small inputs. For sizes that no choice of tiles depends on."""
        return small if self.small else full


def sites(place: Place) -> Iterator[Site]:
    """Yield all launches whose tiles can be chosen, at the models' shapes."""
    for columns in WIDTHS:
        yield from _norm("rms_norm", rms_norm_tiles, columns, place)
    yield from _norm("layer_norm", layer_norm_tiles, 1152, place)
    choices: Sequence[Any]
    for dim in (128, 256):
        choices = rotary_tiles.candidates(dim, place.tiles_for)
        yield Site("apply_rotary", rotary_tiles.key(dim), choices, partial(_rotary, dim, place))
    features = place.size(16384, 2048)
    choices = geglu_tiles.candidates(features, place.tiles_for)
    yield Site("geglu", geglu_tiles.KEY, choices, partial(_geglu, features, place))
    for width, hidden in MLP_WIDTHS.items() if place.dtype != torch.float32 else ():
        for rows in (1, 16, 272, 4352):
            shape = (place.size(rows), width, place.size(hidden))
            choices = mlp_tiles.candidates(rows, place.tiles_for)
            yield Site("geglu_mlp", mlp_tiles.key(*shape), choices, partial(_mlp, *shape, place))
    if place.dtype != torch.float32:
        for rows in (1, 272):
            for inner, features in ((2048, 2048), (16384, 2048), (2048, 16384)):
                yield _int8(rows, inner, place.size(features), features > inner, place)
    for width in WIDTHS:
        for tokens in (16, 32, 64, 512) if place.small else (16, 64, 512, 4096):
            choices = loss_tiles.candidates(tokens, place.dtype, place.tiles_for)
            yield Site("linear_cross_entropy", loss_tiles.key(tokens), choices, partial(_loss, tokens, width, place))
    if place.dtype != torch.float32:
        for dim in (72, 128, 256):
            for kernel in ("forward", "backward_dq", "backward_dkv"):
                yield _attention(kernel, dim, place.size(1024, 72), place)
            yield _attention("forward", dim, 1, place)


def _attention(kernel: str, dim: int, queries: int, place: Place) -> Site:
    rows = queries * (1 if dim == 72 else 8)
    of = (kernel, dim, place.dtype.itemsize, rows)
    choices = attention_tiles.candidates(*of, place.tiles_for)
    prepare = _attention_backward if kernel.startswith("backward") else _attention_forward
    return Site("prefix_lm_attention", attention_tiles.key(*of), choices, partial(prepare, dim, queries, place))


def _attention_forward(dim: int, queries: int, place: Place, grad: bool = False) -> partial[Any]:
    """Return SigLIP's attention for head dimension 72, else Gemma's with a prefix of three quarters of the keys."""
    batch, heads, kv_heads = (place.size(8, 1), 16, 16) if dim == 72 else (place.size(4, 1), 8, 1)
    keys = place.size(max(queries, 1024), 72)
    q, k, v = (
        place.draw(batch, h, s, dim, grad=grad) for h, s in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    )
    return partial(pg_kernels.prefix_lm_attention, q, k, v, prefix_lens=keys * 3 // 4, causal=dim != 72)


def _attention_backward(dim: int, queries: int, place: Place) -> Callable[[], object]:
    forward = _attention_forward(dim, queries, place, grad=True)
    with backend("triton"):
        out = forward()
    return partial(torch.autograd.grad, out, forward.args, out.detach(), retain_graph=True)


def _norm(op: str, tiles: Any, columns: int, place: Place) -> Iterator[Site]:
    for kernel, prepare in (("forward", _norm_forward), ("backward", _norm_backward)):
        of = (kernel, columns, place.dtype.itemsize)
        yield Site(op, tiles.key(*of), tiles.candidates(*of, place.tiles_for), partial(prepare, op, columns, place))


def _norm_forward(op: str, columns: int, place: Place) -> partial[Any]:
    x, residual = (place.draw(place.size(4096), columns, grad=True) for _ in range(2))
    parameters = [place.draw(columns, grad=True) for _ in range(2 if op == "layer_norm" else 1)]
    return partial(getattr(pg_kernels, op), x, *parameters, residual=residual)


def _norm_backward(op: str, columns: int, place: Place) -> Callable[[], object]:
    forward = _norm_forward(op, columns, place)
    with backend("triton"):
        outputs = forward()
    inputs = [*forward.args, forward.keywords["residual"]]
    grads = [out.detach() for out in outputs]
    return partial(torch.autograd.grad, outputs, inputs, grads, retain_graph=True)


def _rotary(dim: int, place: Place) -> Callable[[], object]:
    q, k = (place.draw(1, heads, place.size(4096), dim) for heads in (8, 1))
    return partial(pg_kernels.apply_rotary, q, k, torch.arange(q.shape[2], device=place.device))


def _geglu(features: int, place: Place) -> Callable[[], object]:
    return partial(pg_kernels.geglu, *(place.draw(place.size(4096), features) for _ in range(2)))


def _mlp(rows: int, width: int, hidden: int, place: Place) -> Callable[[], object]:
    """Return a call without gradients, for which the fused kernel is used."""
    gate, up = (place.draw(hidden, width) for _ in range(2))
    return partial(pg_kernels.geglu_mlp, place.draw(rows, width), gate, up, place.draw(width, hidden))


def _int8(rows: int, inner: int, features: int, gated: bool, place: Place) -> Site:
    of = (rows, inner, features, place.dtype, gated)
    choices = int8_tiles.candidates(rows, gated, place.tiles_for)
    return Site("int8_linear", int8_tiles.key(*of), choices, partial(_int8_product, *of, place))


def _int8_product(
    rows: int, inner: int, features: int, dtype: torch.dtype, gated: bool, place: Place
) -> Callable[[], object]:
    """Return a call of the kernel launch. The op would first convert weights that another backend packed."""
    data = [
        torch.randint(-127, 128, (features, inner), dtype=torch.int8, device=place.device) for _ in range(1 + gated)
    ]
    scales = [torch.full((features, 1), 1e-3, device=place.device) for _ in data]
    biases, sizes, x = [None for _ in data], [features for _ in data], place.draw(rows, inner)
    return partial(int8_launch.multiply, x, Int8Product(data, scales, biases, sizes, inner, False, dtype, gated))


def _loss(tokens: int, width: int, place: Place) -> Callable[[], object]:
    width = place.size(width, 256)
    hidden, weight = place.draw(tokens, width, grad=True), place.draw(place.size(257_152, 512), width, grad=True)
    labels = torch.randint(0, len(weight), (tokens,), device=place.device)

    def call() -> object:
        loss = pg_kernels.linear_cross_entropy(hidden, weight, labels)
        return torch.autograd.grad(loss, [hidden, weight])

    return call


def tune(ops: Sequence[str], device: torch.device, command: str) -> Path:
    """Time the candidates of `ops` (default: all) in bf16 on a GPU, and store the fastest in the GPU's tuning file.

    Later processes read that file. It is rewritten after each launch, so that an interruption loses no result. Raises ValueError
    for an op without candidates, and RuntimeError if the kernels do not run.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"nothing to tune in {op!r}; there are {', '.join(OPS)}")
    unavailable_reason = _unavailable_reason(device)
    if unavailable_reason is not None:
        raise RuntimeError(f"tuning on {device} is not possible: {unavailable_reason}")
    found = devices.device_of(torch.empty(0, device=device))
    path = devices.tuned_path(found.name)
    tiles = read_json_object(path)["tiles"] if path.exists() else {}
    with devices.override_tiles({}):  # ignore earlier tuning
        candidates = [site for site in sites(Place(device, found, torch.bfloat16)) if not ops or site.op in ops]
        for site in tqdm(candidates, unit="launch", disable=None):
            best, report = _fastest(site, device)
            tqdm.write(f"{site.op}, {site.key}: {report}", file=sys.stderr)
            tiles.setdefault(site.op, {}).pop(site.key, None)
            if best is not None:
                tiles[site.op][site.key] = asdict(best)
            content = {"device": found.name, "versions": versions(), "command": command, "tiles": tiles}
            write_atomically(path, json_bytes(content))
    return path


def _unavailable_reason(device: torch.device) -> str | None:
    return "needs a CUDA GPU" if device.type == "cpu" else devices.unavailable_reason(device.type)


def _fastest(site: Site, device: torch.device) -> tuple[Any | None, str]:
    """Return the candidate that beats the default tiles, or None, and a report of the times."""

    call = site.prepare()

    def run(choice: Any | None) -> object:
        with backend("triton"), choosing(site, choice):
            return call()

    def task(choice: Any | None) -> TimedCall:
        run(choice)  # compiles
        return TimedCall(lambda _: run(choice))

    choices: dict[str, Any | None] = {"usual": None, **{str(choice): choice for choice in site.candidates}}
    contenders = {name: [task(choice)] for name, choice in choices.items()}
    samples = interleave(contenders, device, Effort(budget_s=0.5, min_rounds=5, max_rounds=200))
    times = {name: median(found.device_s) for name, found in samples.items()}
    winner = min(times, key=times.__getitem__)
    report = ", ".join(f"{name} {duration(time)}" for name, time in times.items())
    wins = times[winner] < (1.0 - SMALLEST_GAIN) * times["usual"]
    return (choices[winner] if wins else None), report


def choosing(site: Site, choice: Any | None) -> AbstractContextManager[None]:
    """Launch a site with one of its candidates, or with the default tiles for None."""
    return nullcontext() if choice is None else devices.override_tiles({(site.op, site.key): asdict(choice)})
