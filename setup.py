"""Builds the C++ extensions and lists the packages; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
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


# A level of optimisation that was asked for holds.
LEVEL = [] if any("-O" in os.environ.get(name, "") for name in ("CFLAGS", "CXXFLAGS")) else ["-O3"]

# A100 and its like, and Hopper with its own instructions; newer GPUs compile the first one's portable code when they load it.
GPUS = ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a"]


def nvcc() -> str | None:
    """CUDA's compiler: $NVCC, which may be empty for none, or the one on the path, or in $CUDA_HOME or its usual folder."""
    if "NVCC" in os.environ:
        return os.environ["NVCC"] or None
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


class BuildExtension(build_ext):
    """Adds a file's own flags; where the compiler lacks one of them, the file compiles to nothing. CUDA's files go to nvcc."""

    def build_extension(self, ext: Any) -> None:
        if ext.name == CUDA:
            self.build_cuda(ext)
        else:
            self.build_cpu(ext)

    def build_cuda(self, ext: Any) -> None:
        compiler = nvcc()
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O3", "--threads", "2", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        flags += [f"-I{path}" for path in ext.include_dirs] + [f"-D{name}={value}" for name, value in ext.define_macros]
        objects = []
        for source in ext.sources:
            objects.append(str(folder / f"{Path(source).name}.o"))
            gpus = [flag for gpu in GPUS for flag in ("-gencode", gpu)] if source.endswith(".cu") else []
            self.spawn([compiler, *flags, *gpus, "-c", source, "-o", objects[-1]])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # CUDA's runtime goes into the library: one build works beside every torch, and loads where there is no GPU.
        self.spawn([compiler, "-shared", "-cudart", "static", *objects, "-o", str(target)])

    def build_cpu(self, ext: Any) -> None:
        compile_file = self.compiler._compile
        flags = {name: wanted for name, wanted in FLAGS.items() if all(has_flag(self.compiler, f) for f in wanted)}

        def compile_with_flags(obj: str, src: str, ext: str, cc_args: Any, extra_postargs: Any, pp_opts: Any) -> None:
            compile_file(obj, src, ext, cc_args, [*extra_postargs, *flags.get(Path(src).name, [])], pp_opts)

        self.compiler._compile = compile_with_flags
        super().build_extension(ext)


cpu_extension = Pybind11Extension(
    "pg_kernels._C",
    ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
    # Rebuilds when a header changes, and puts headers into the source distribution.
    depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
    include_dirs=["csrc"],
    libraries=["dl"] if sys.platform == "linux" else [],
    cxx_std=17,
    # Compilers differ in whether they fuse a product and a sum by themselves; results must not. Nobody asks which floating-point
    # exceptions were raised: GCC keeps them by leaving loops with comparisons scalar where vectors have no masks (AVX2).
    extra_compile_args=[*LEVEL, "-ffp-contract=off", "-fno-trapping-math"],
    # Without a working compiler the package still installs, and the op runs on its other backends.
    optional=True,
)

CUDA = "pg_kernels._cuda"
cuda_extension = Pybind11Extension(
    CUDA,
    ["csrc/cuda/bindings.cpp", *sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))],
    depends=sorted(str(path) for path in Path("csrc/cuda").glob("*.h")),
    include_dirs=["csrc", sysconfig.get_path("include")],
    define_macros=[("PG_KERNELS_CUDA_MODULE", "_cuda")],
    optional=True,
)

setup(
    # The folders model/ and benchmarks/ are installed as pg_kernels.model and pg_kernels.benchmarks.
    packages=[*find_packages(include=["pg_kernels", "pg_kernels.*"]), "pg_kernels.model", "pg_kernels.benchmarks"]
    + [f"pg_kernels.model.{name}" for name in find_packages("model")],
    package_dir={"pg_kernels.model": "model", "pg_kernels.benchmarks": "benchmarks"},
    ext_modules=[cpu_extension, *([cuda_extension] if nvcc() and sys.platform == "linux" else [])],
    cmdclass={"build_ext": BuildExtension},
)
