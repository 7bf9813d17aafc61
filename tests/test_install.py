"""What a user installs: a wheel built from the tracked files, with a compiler and without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTENSIONS = ["_C", "_cuda"] if sys.platform == "linux" else ["_C"]
TRACKED = [
    path
    for path in subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    if path and (ROOT / path).is_file()
]


class Wheel:
    """A built wheel and the output of its build."""

    def __init__(self, path: Path, output: str) -> None:
        self.path = path
        self.output = output
        with zipfile.ZipFile(path) as archive:
            self.files = {name: archive.read(name) for name in archive.namelist()}

    @property
    def extensions(self) -> list[str]:
        return [name for name in self.files if name.endswith((".so", ".pyd"))]

    @property
    def metadata(self) -> Message:
        (name,) = (name for name in self.files if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(self.files[name].decode())


def copy_tracked(folder: Path) -> Path:
    for path in TRACKED:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    return folder


def build(folder: Path, **environment: str) -> Wheel:
    """Build without torch, as on a fresh machine. No part of the build may need it."""
    source, blocked = copy_tracked(folder / "source"), folder / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('the build asked for torch')")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", folder / "out", source],
        cwd=folder,
        # With optimisation the extension compiles for half a minute, as it did for the installed package.
        env={
            **os.environ,
            "CFLAGS": "-O0",
            "CXXFLAGS": "-O0",
            "PYTHONPATH": str(blocked),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (path,) = (folder / "out").glob("*.whl")
    return Wheel(path, done.stdout)


NVCC = """#!/bin/sh
echo "fake nvcc $*"
while [ "$1" != -o ]; do shift; done
: > "$2"
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """Build with a CUDA compiler that writes empty files. The real one takes most of a minute."""
    folder = tmp_path_factory.mktemp("wheel")
    return build(folder, PG_KERNELS_CUDA="1", NVCC=str(program(folder / "nvcc", NVCC)))


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    folder = tmp_path_factory.mktemp("without_compiler")
    compiler = str(program(folder / "compiler", "#!/bin/sh\necho 'this compiler always fails' >&2\nexit 1\n"))
    return build(folder, CC=compiler, CXX=compiler, PG_KERNELS_CUDA="1", NVCC=compiler)


def program(path: Path, script: str) -> Path:
    path.write_text(script)
    path.chmod(0o755)
    return path


def installed_name(path: str) -> str:
    return f"pg_kernels/{path}" if path.startswith(("model/", "benchmarks/")) else path


def _is_benchmark_module(path: str) -> bool:
    return path.startswith("benchmarks/") and not path.startswith("benchmarks/suite/") and path.endswith(".py")


def test_a_wheel_holds_the_whole_package(wheel: Wheel) -> None:
    """The wheel holds every tracked file of the package, also the built-in checkpoint, and the extensions.

    Of the benchmarks it holds the modules, without stored runs and without pytest's files.
    """
    wanted = [path for path in TRACKED if path.startswith(("pg_kernels/", "model/")) or _is_benchmark_module(path)]
    assert {"pg_kernels/py.typed", "model/cli/run.py", "model/checkpoints/huggingface.py"} <= set(wanted)
    missing = [path for path in wanted if installed_name(path) not in wheel.files]
    assert not missing
    assert all(wheel.files[installed_name(path)] == (ROOT / path).read_bytes() for path in wanted)
    assert sorted(name.partition(".")[0] for name in wheel.extensions) == [f"pg_kernels/{e}" for e in EXTENSIONS]


@pytest.mark.skipif("_cuda" not in EXTENSIONS, reason="CUDA is built on Linux only")
def test_cuda_is_compiled_for_every_gpu(wheel: Wheel) -> None:
    commands = [line for line in wheel.output.splitlines() if "fake nvcc" in line]
    for source in (path for path in TRACKED if path.startswith("csrc/cuda/") and path.endswith(".cu")):
        (command,) = (line for line in commands if source in line)
        assert "code=[sm_80,compute_80]" in command and "code=sm_90a" in command


CONFIGURE = """
import pathlib, sys
import setuptools
setuptools.setup = lambda **arguments: print(*(extension.name for extension in arguments["ext_modules"]))
pathlib.Path.exists = lambda path: sys.argv[1] == "driver"
exec(open("setup.py").read())
"""


@pytest.mark.skipif("_cuda" not in EXTENSIONS, reason="CUDA is built on Linux only")
@pytest.mark.parametrize(
    ("wanted", "machine", "built"),
    [("", "driver", True), ("", "no driver", False), ("0", "driver", False), ("1", "no driver", True)],
)
def test_cuda_is_built_where_a_gpu_is_or_on_request(wanted: str, machine: str, built: bool) -> None:
    done = configure(machine, PG_KERNELS_CUDA=wanted, NVCC="nvcc")
    assert ("pg_kernels._cuda" in done.stdout.split()) == built, done.stderr


@pytest.mark.skipif("_cuda" not in EXTENSIONS, reason="CUDA is built on Linux only")
def test_cuda_cannot_be_built_without_its_compiler() -> None:
    done = configure("no driver", PG_KERNELS_CUDA="1", NVCC="", PATH="", CUDA_HOME="/nonexistent")
    assert (done.returncode, done.stderr) == (
        1,
        "PG_KERNELS_CUDA=1, but there is no nvcc; NVCC=path says where it is\n",
    )
    done = configure("driver", PG_KERNELS_CUDA="yes")
    assert (done.returncode, done.stderr) == (1, "PG_KERNELS_CUDA: got 'yes', expected 1 or 0\n")


def configure(machine: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py up to its call of `setup`, and print the names of the extensions that it would build."""
    return subprocess.run(
        [sys.executable, "-c", CONFIGURE, machine],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_a_wheel_holds_nothing_else(wheel: Wheel) -> None:
    wanted = [path for path in TRACKED if not path.startswith("benchmarks/") or _is_benchmark_module(path)]
    expected = {installed_name(path) for path in wanted} | set(wheel.extensions)
    strange = [name for name in wheel.files if name not in expected and ".dist-info/" not in name]
    assert not strange


def test_metadata(wheel: Wheel) -> None:
    metadata = wheel.metadata
    required = {line.split(";")[0].strip() for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert required == {
        "torch>=2.10",
        "numpy",
        "safetensors",
        "huggingface_hub>=0.34",
        "sentencepiece",
        "pillow",
        "tqdm",
    }
    assert metadata["Name"] == "pg_kernels" and metadata["Requires-Python"] == ">=3.10"
    (entry_points,) = (name for name in wheel.files if name.endswith("entry_points.txt"))
    assert b"pg-kernels = pg_kernels.model.cli:main" in wheel.files[entry_points]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.files)


def test_the_build_does_not_require_torch() -> None:
    (requires,) = (line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("requires ="))
    assert requires == 'requires = ["setuptools>=77", "pybind11>=2.13"]'


def test_without_a_compiler_only_the_extensions_are_missing(wheel: Wheel, without_compiler: Wheel) -> None:
    assert not without_compiler.extensions
    assert {name: wheel.files[name] for name in wheel.files if not name.endswith((".so", ".pyd", "/RECORD"))} == {
        name: content for name, content in without_compiler.files.items() if not name.endswith("/RECORD")
    }
    assert "this compiler always fails" in without_compiler.output
    for name in EXTENSIONS:
        assert f'building extension "pg_kernels.{name}" failed' in without_compiler.output


USE = """
import json, sys
# An editable install of the same package would lend its extension.
sys.meta_path = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
import torch, pg_kernels
from pg_kernels import backends, int8_linear
assert pg_kernels.__file__.startswith(sys.argv[1]), pg_kernels.__file__
y = int8_linear(torch.ones(2, 5), torch.full((3, 5), 2, dtype=torch.int8), torch.ones(3))
assert y.tolist() == [[10.0] * 3] * 2
print(json.dumps(backends.explain("cpu")["int8_linear"]))
from pg_kernels.model import cli
assert cli.main(["info"]) == 0
"""


def use(wheel: Wheel, folder: Path) -> str:
    """Install a wheel on its own, multiply with it, and return the backend that it reports."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel.path]
    subprocess.run(pip, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    done = subprocess.run(
        [sys.executable, "-c", USE, folder],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_wheel_multiplies_natively(wheel: Wheel, tmp_path: Path) -> None:
    assert use(wheel, tmp_path).startswith('["native", ')


def test_without_the_extension_the_reference_multiplies(without_compiler: Wheel, tmp_path: Path) -> None:
    account = use(without_compiler, tmp_path)
    assert account.startswith('["reference", ')
    assert "\nextension   pg_kernels._C is not built: pip found no C++ compiler" in account


def test_an_editable_install_survives_a_missing_compiler(tmp_path: Path) -> None:
    """The sdist's build copies the extension into the source folder, if there is one."""
    copy_tracked(tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={
            **os.environ,
            "CC": "/nonexistent/cc",
            "CXX": "/nonexistent/c++",
            "PG_KERNELS_CUDA": "1",
            "NVCC": "/nonexistent/nvcc",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert not list((tmp_path / "pg_kernels").glob("*.so"))
