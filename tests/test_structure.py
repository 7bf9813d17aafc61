"""The package's structure: imports point one way without circles, a class name means one class, the vocabulary is in use."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "pg_kernels.model": ROOT / "model",
    "pg_kernels.benchmarks": ROOT / "benchmarks",
    "pg_kernels": ROOT / "pg_kernels",
}
# From the bottom to the top. A module belongs to the last part that its name begins with.
PARTS = (
    ("pg_kernels._C", "pg_kernels._cuda", "pg_kernels.lazy", "pg_kernels.modes"),
    ("pg_kernels.ops", "pg_kernels.backends"),
    ("pg_kernels.nn", "pg_kernels.quantization"),
    ("pg_kernels",),
    ("pg_kernels.integrations",),
    ("pg_kernels.model",),
    ("pg_kernels.benchmarks",),
    ("pg_kernels.model.cli",),
)
LEVELS = {name: level for level, names in enumerate(PARTS) for name in names}


def modules() -> dict[str, Path]:
    """Return every module of the package by its installed name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in [*folder.rglob("*.py"), *folder.rglob("*.pyi")]:
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imported(name: str, source: str, is_package: bool, known: set[str]) -> Iterator[str]:
    """Yield the package's modules that a module imports anywhere: at the top, in functions, under TYPE_CHECKING."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                # `from package import module` uses the module, `from package import name` the package.
                target = f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                if target in known:
                    yield target


def imports() -> dict[str, set[str]]:
    found = modules()
    return {
        name: set(imported(name, path.read_text(encoding="utf-8"), path.name == "__init__.py", set(found))) - {name}
        for name, path in found.items()
    }


def level(module: str) -> int:
    """Return the level of the part that a module belongs to."""
    name = module
    while name not in LEVELS:
        name = name.rpartition(".")[0]
    return LEVELS[name]


def upward(graph: dict[str, set[str]]) -> list[str]:
    return sorted(
        f"{name} imports {used}" for name, uses in graph.items() for used in uses if level(used) > level(name)
    )


IMPORTS = imports()


def test_no_import_points_upwards() -> None:
    # `python -m pg_kernels` may call the command line.
    assert upward({name: uses for name, uses in IMPORTS.items() if name != "pg_kernels.__main__"}) == []


def test_there_is_no_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


def test_only_ops_import_their_definitions() -> None:
    """A backend that used the definition would be compared with itself in tests."""
    backends = ("launch", "kernels", "tiles", "cpu", "cuda", "sdpa")
    for name, uses in IMPORTS.items():
        if name.rpartition(".")[2] in backends:
            assert not [used for used in uses if used.endswith(".reference")], name


@pytest.mark.parametrize(
    "source",
    [
        "from pg_kernels.model import files",
        "def f():\n    import pg_kernels.model.files",
        "if TYPE_CHECKING:\n    from ..model.files import write_atomically",
    ],
)
def test_finds_every_kind_of_import(source: str) -> None:
    name = "pg_kernels.ops.invented"
    graph = {name: set(imported(name, source, False, {*IMPORTS, name}))}
    assert upward(graph) == [f"{name} imports pg_kernels.model.files"]


def test_no_two_classes_have_one_name() -> None:
    owners: dict[str, list[str]] = {}
    for name, path in modules().items():
        if path.suffix == ".py":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    owners.setdefault(node.name, []).append(name)
    # Every op has its own Tiles class, used as `tiles.Tiles`.
    assert {name: found for name, found in owners.items() if len(found) > 1 and name != "Tiles"} == {}


def test_the_vocabulary_is_in_use() -> None:
    """Every name in CONTRIBUTING's first column occurs in the code."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("### Vocabulary")[2]
    names = [name for row in re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    code = "\n".join(path.read_text(encoding="utf-8") for path in modules().values())
    assert len(names) > 30 and [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_python_m_benchmarks_loads_no_second_copy_of_the_modules() -> None:
    """In a clone, `python -m benchmarks` imports pg_kernels.benchmarks, not modules named benchmarks.x."""
    script = (
        "import contextlib, runpy, sys\n"
        "sys.argv[1:] = ['--help']\n"
        "with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):\n"
        "    runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)\n"
        "print(*(name for name in sys.modules if name.split('.')[0] == 'benchmarks'))\n"
        "print('pg_kernels.benchmarks' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["benchmarks", "True"], done.stdout
