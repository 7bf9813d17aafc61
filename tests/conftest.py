"""Without a GPU, Triton's kernels run in its interpreter, which must be known before the first of them is imported."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch


def _patch_each_module_once() -> None:
    """Keep what the interpreter does to Triton's language, instead of doing it again at every call of a @triton.jit function.

    That was two fifths of the interpreter's time. Nothing is compiled in its processes, so nothing needs the language unchanged.
    """
    from triton.runtime import interpreter

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
        _patch_each_module_once()
