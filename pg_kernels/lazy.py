"""Public names that are imported at their first use: importing a package does not import torch."""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__`, which take public names from the package's module `api`.

    `api` lists them in its `__all__`. It is not imported for submodules and private names.

    Source: PEP 562.
    """

    def get(name: str) -> Any:
        if name == "__all__" or not (name.startswith("_") or find_spec(f"{package}.{name}")):
            api = import_module(f"{package}.api")
            if name == "__all__" or name in api.__all__:
                value = getattr(api, name)
                setattr(sys.modules[package], name, value)
                return value
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *get("__all__")})

    return get, names
