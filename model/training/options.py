"""A recipe's fields as command-line options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from .recipe import Recipe


def add_recipe_options(parser: argparse.ArgumentParser, defaults: Mapping[str, str]) -> None:
    """Add an option for every field of `Recipe`, in groups. `defaults` describes the command's own defaults, by field."""
    hints = get_type_hints(Recipe)
    groups: dict[str, Any] = {}
    for field in fields(Recipe):
        assert field.default is not MISSING
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        own = field.name in defaults
        shown = defaults.get(field.name, "" if field.default in (None, ()) else "%(default)s")
        settings: dict[str, Any] = {"dest": field.name, "default": None if own else field.default}
        kind = next((part for part in get_args(hints[field.name]) if part is not NoneType), hints[field.name])
        if kind is bool:
            settings |= {"action": "store_true", "help": field.metadata["help"]}
        else:
            settings |= {"type": kind, "help": field.metadata["help"] + f" (default: {shown})" * bool(shown)}
            if get_origin(hints[field.name]) is tuple:
                some = get_args(hints[field.name])
                settings |= {"nargs": "+" if Ellipsis in some else len(some)}
            if "choices" in field.metadata:
                settings |= {"choices": field.metadata["choices"]}
            else:
                settings |= {"metavar": field.metadata.get("metavar", {int: "N", float: "X", str: "NAME"}[kind])}
        option = field.metadata.get("option", f"--{field.name.replace('_', '-')}")
        groups[title].add_argument(option, **settings)


def recipe_from(options: argparse.Namespace, **others: Any) -> Recipe:
    """Make a recipe from the options, with `others` for fields that were not given. Raises ValueError as `Recipe` does."""
    values = {field.name: getattr(options, field.name) for field in fields(Recipe)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Recipe(**{**values, **{name: value for name, value in others.items() if values[name] is None}})
