"""Without a GPU, Triton kernels run in the interpreter. TRITON_INTERPRET must be set before the first kernel is imported."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch


def _speed_up_the_interpreter() -> None:
    """Remove redundant work from Triton's interpreter, which takes three fifths of its time."""
    from triton.runtime import interpreter

    # The interpreter repeats integer sums and products in int64 and compares the results, for assertions that it never makes.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)

    # The interpreter rebuilds its table of dtypes for every lookup.
    look, known = interpreter._get_np_dtype, {}

    def np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name  # pointers are not hashable, but their scalar type has a name, too
        if name not in known:
            known[name] = look(dtype)
        return known[name]

    interpreter._get_np_dtype = np_dtype

    # The interpreter patches Triton's language for each call of a @triton.jit function and undoes the patch afterwards. Processes
    # with the interpreter compile nothing, so the patch can stay.
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Callable[..., Any]) -> Any:
        module = function.__globals__["__name__"]
        if module not in patched:
            patch(function)
            patched.add(module)
        return interpreter._LangPatchScope()  # an empty list of changes to undo

    interpreter._patch_lang = patch_once


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        _speed_up_the_interpreter()
