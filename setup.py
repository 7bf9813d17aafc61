"""Builds the C++ extension and lists the packages; everything else is in pyproject.toml."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import Pybind11Extension, has_flag
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

# Files for one instruction set are compiled for it, all others for any machine of the kind: which code runs is decided there.
X86 = {
    "isa_avx512_vnni.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
    "isa_avx_vnni.cpp": ["-mavx2", "-mavxvnni"],
    "isa_avx2.cpp": ["-mavx2"],
}
ARM = {"isa_neon.cpp": ["-march=armv8.2-a+dotprod"]}
FLAGS = {"x86_64": X86, "aarch64": ARM, "arm64": ARM}.get(platform.machine(), {})


class BuildExtension(build_ext):
    """Adds a file's own flags; where the compiler lacks one of them, the file compiles to nothing."""

    def build_extension(self, ext: Any) -> None:
        compile_file = self.compiler._compile
        flags = {name: wanted for name, wanted in FLAGS.items() if all(has_flag(self.compiler, f) for f in wanted)}

        def compile_with_flags(obj: str, src: str, ext: str, cc_args: Any, extra_postargs: Any, pp_opts: Any) -> None:
            compile_file(obj, src, ext, cc_args, [*extra_postargs, *flags.get(Path(src).name, [])], pp_opts)

        self.compiler._compile = compile_with_flags
        super().build_extension(ext)


extension = Pybind11Extension(
    "pg_kernels._C",
    sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
    # Rebuilds when a header changes, and puts headers into the source distribution.
    depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
    include_dirs=["csrc"],
    libraries=["dl"] if sys.platform == "linux" else [],
    cxx_std=17,
    # Compilers differ in whether they fuse a product and a sum by themselves; results must not.
    extra_compile_args=["-O3", "-ffp-contract=off"],
    # Without a working compiler the package still installs, and the op runs on its other backends.
    optional=True,
)

setup(
    # The folders model/ and benchmarks/ are installed as pg_kernels.model and pg_kernels.benchmarks.
    packages=[*find_packages(include=["pg_kernels", "pg_kernels.*"]), "pg_kernels.model", "pg_kernels.benchmarks"]
    + [f"pg_kernels.model.{name}" for name in find_packages("model")],
    package_dir={"pg_kernels.model": "model", "pg_kernels.benchmarks": "benchmarks"},
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
)
