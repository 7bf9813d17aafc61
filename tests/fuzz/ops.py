"""Call the ops with random arguments: each must give its float64 definition's result, or name the wrong argument.

    python tests/fuzz/ops.py --count 10000

Half of the calls have one damaged argument. A call fails on a signal, a hang, an exception that names no argument, and on a
result whose error exceeds twice PyTorch's in that dtype. Prints the failures, each with the number that `--first` repeats it
by, and counts by outcome. The calls are in `calls.py`.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import resource
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from calls import CALLS, Draw, NoDefinition  # noqa: E402
from damages import damaged  # noqa: E402

from pg_kernels import PackedInt8Weight, backend  # noqa: E402

SECONDS = 20
"""Seconds after which a call counts as hanging. The slowest undamaged call takes a tenth of a second."""
MEMORY = 4 * 2**30
"""Address space in bytes beyond the parent's, so that a damaged number cannot be allocated."""
BATCH = 500
"""Calls per process."""
FINE = ("right", "right although damaged", "refused", "no definition")
TORCH_REFUSES = "Could not run 'pg_kernels::"
"""PyTorch's error if a registered op has no implementation for a kind of tensor."""
FP32_EPS = torch.finfo(torch.float32).eps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="calls (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first call (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    outcomes: Counter[str] = Counter()
    number, end = options.first, options.first + options.count
    with tqdm(total=options.count, unit="call", disable=None) as bar:
        while number < end:
            last = min(number + BATCH, end)
            for outcome, what, message in run_calls(range(number, last)):
                outcomes[outcome] += 1
                if outcome not in FINE:
                    print(f"\n{number}: {outcome}: {what}\n{message}", flush=True)
                number += 1
                bar.update()
    print(f"{options.count} calls: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
    return int(any(outcome not in FINE for outcome in outcomes))


def run_calls(numbers: range) -> list[tuple[str, str, str]]:
    """Return outcome, call and message of each call, made in one child process. If a call ends the process, it is the last."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run(numbers, writer)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as stream:
        lines = [json.loads(line) for line in stream]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results = [tuple(line) for line in lines if len(line) == 3]
    if len(results) < len(numbers):
        what = lines[-1][0] if lines and len(lines[-1]) == 1 else "between calls"
        results.append((f"signal {-code}" if code < 0 else "hang or exit", what, f"the process ended with {code}"))
    return results  # type: ignore[return-value]


def _run(numbers: range, writer: int) -> None:
    """Make the calls, in the child process."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        faulthandler.enable()
        warnings.simplefilter("ignore")
        with open(writer, "w", encoding="utf-8") as stream:
            for number in numbers:
                faulthandler.dump_traceback_later(SECONDS, exit=True)
                for line in run_call(number):
                    stream.write(json.dumps(line) + "\n")
                    stream.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(70)


def run_call(number: int) -> Any:
    """Yield the description of a call, then its outcome and message."""
    draw = Draw(number)
    name = draw.choice(list(CALLS))
    call = CALLS[name](draw)
    is_damaged = draw.chance(0.5)
    asked = draw.choice(("auto", "auto", "reference"))
    if is_damaged:
        argument = draw.choice(list(call.arguments))
        call.arguments[argument] = damaged(call.arguments[argument], draw)
    what = f"{name}({', '.join(f'{key}={_describe(value)}' for key, value in call.arguments.items())}), {asked}"
    yield (what,)
    wanted = call.differentiable if not is_damaged and draw.chance(0.4) else ()
    generator = torch.Generator().manual_seed(2**32 + number)  # not the arguments' values
    try:
        with backend(asked):
            ours, cotangents = _results(call.op, call.arguments, wanted, generator)
    except (ValueError, TypeError, RuntimeError) as error:
        text = str(error)
        if not is_damaged:
            yield "exception", what, traceback.format_exc()
        elif any(re.search(rf"\b{re.escape(key)}", text) for key in (*call.arguments, *call.names, TORCH_REFUSES)):
            yield "refused", what, ""
        else:
            yield "unclear", what, f"{type(error).__name__}: {text[:500]}"
        return
    except Exception:
        yield "exception", what, traceback.format_exc()
        return
    try:
        if name.startswith("torch.ops.") and any(map(_is_meta, call.arguments.values())):
            raise NoDefinition  # PyTorch asks the op for shapes only
        if not all(map(_is_finite, call.arguments.values())):
            raise NoDefinition  # PyTorch's matrix products differ with the layout
        exact, _ = _results(call.definition, _double(call.arguments), wanted, cotangents)
        plain, _ = _results(call.definition, call.arguments, wanted, cotangents)
    except NoDefinition:
        yield "no definition", what, ""
        return
    except Exception as error:
        yield "accepted", what, f"the definition: {type(error).__name__}: {str(error)[:500]}"
        return
    outcome, message = _compare(ours, plain, exact, call.slack + bool(wanted) * call.gradient_slack)
    yield ("right although damaged" if is_damaged and outcome == "right" else outcome), what, message


def _results(
    function: Any, arguments: dict[str, Any], wanted: Sequence[str], cotangents: Any
) -> tuple[list[Tensor], Any]:
    """Return outputs, wanted gradients and cotangents (given, or random ones in the outputs' dtypes)."""
    if not wanted:
        with torch.no_grad():
            return _as_list(function(**arguments)), None
    leaves = {
        key: value.detach().requires_grad_()
        for key, value in arguments.items()
        if key in wanted and isinstance(value, Tensor)
    }
    outputs = _as_list(function(**arguments | leaves))
    if isinstance(cotangents, torch.Generator):
        cotangents = [torch.randn(out.shape, generator=cotangents).to(out.dtype) for out in outputs]
    given = [cotangent.to(out.dtype) for cotangent, out in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), given)
    return [*(out.detach() for out in outputs), *gradients], cotangents


def _is_meta(value: Any) -> bool:
    return any(map(_is_meta, value)) if isinstance(value, list | tuple) else isinstance(value, Tensor) and value.is_meta


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    dense = isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided
    return not dense or value.is_meta or bool(value.isfinite().all())


def _as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _double(value: Any) -> Any:
    """Return the same numbers in float64."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_double(item) for item in value)
    return value


def _compare(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor], slack: float) -> tuple[str, str]:
    """Return the bound: twice PyTorch's error, one rounding of the result, a few fp32 roundings, and the call's own slack."""
    if len(ours) != len(exact):
        return "wrong", f"{len(ours)} results, expected {len(exact)}"
    order = max((right.abs().max().item() for right in exact if right.numel() and not right.is_meta), default=0.0)
    order = max(order, 1.0)
    for index, (our, low, right) in enumerate(zip(ours, plain, exact, strict=True)):
        if our.shape != right.shape or our.dtype != low.dtype:
            return "wrong", f"{index}: {list(our.shape)} {our.dtype}, expected {list(right.shape)} {low.dtype}"
        if our.is_meta or not our.numel():
            continue
        if not (right.isfinite().all() and low.isfinite().all()):
            return "no definition", ""
        if not our.is_floating_point():
            if not torch.equal(our, right):
                return "wrong", f"{index}: other integers"
            continue
        error, allowed = ((t.double() - right).abs().max().item() for t in (our, low))
        bound = 2 * allowed + torch.finfo(our.dtype).eps * right.abs().max().item() + 8 * order * FP32_EPS + slack
        if not error <= bound:
            return "wrong", f"{index}: off by {error:.3g}, allowed {bound:.3g}"
    return "right", ""


def _describe(value: Any) -> str:
    if isinstance(value, Tensor) and value.is_nested:
        return "nested tensor"
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f" {value.layout}"
        strides = f" strides {list(value.stride())}" if not layout and not value.is_contiguous() else ""
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{strides}{layout} {value.device.type}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_describe, value))}]"
    return repr(value) if isinstance(value, PackedInt8Weight) else repr(value)[:60]


if __name__ == "__main__":
    sys.exit(main())
