"""Without a GPU, Triton's kernels run in its interpreter, which must be known before the first of them is imported."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch


def _hurry_the_interpreter() -> None:
    """Leave out what Triton's interpreter does again and again, and to no end: three fifths of its time."""
    from triton.runtime import interpreter

    # Sums and products of integers are computed once more in int64, and compared: for assertions that it makes in no mode.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)

    # A table of all dtypes is made at every look into it.
    look, known = interpreter._get_np_dtype, {}

    def np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name  # of pointers, which are no keys, too
        if name not in known:
            known[name] = look(dtype)
        return known[name]

    interpreter._get_np_dtype = np_dtype

    # Nothing is compiled in the interpreter's processes, so nothing needs Triton's language as it was before each call of a
    # @triton.jit function.
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Callable[..., Any]) -> Any:
        module = function.__globals__["__name__"]
        if module not in patched:
            patch(function)
            patched.add(module)
        return interpreter._LangPatchScope()  # of changes to undo: none

    interpreter._patch_lang = patch_once


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        _hurry_the_interpreter()
