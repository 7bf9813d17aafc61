"""Builds the C++ extensions and lists the packages; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, has_flag
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

# Files for one instruction set get its flags. All other files run on every machine of the architecture and choose at run time.
X86 = {
    "isa_avx512_vnni.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
    "isa_avx_vnni.cpp": ["-mavx2", "-mavxvnni"],
    "isa_avx2.cpp": ["-mavx2"],
}
ARM = {"isa_neon.cpp": ["-march=armv8.2-a+dotprod"]}
FLAGS = {"x86_64": X86, "aarch64": ARM, "arm64": ARM}.get(platform.machine(), {})


# An optimisation level in CFLAGS or CXXFLAGS takes precedence.
LEVEL = [] if any("-O" in os.environ.get(name, "") for name in ("CFLAGS", "CXXFLAGS")) else ["-O3"]

# Ampere, and Hopper with its own instructions. Newer GPUs compile the portable code of compute_80 when they load it.
GPUS = ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a"]


def nvcc() -> str | None:
    """Return the CUDA compiler: $NVCC, nvcc on the path, or nvcc in $CUDA_HOME or its usual folder."""
    return (
        os.environ.get("NVCC")
        or shutil.which("nvcc")
        or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    )


def builds_cuda() -> bool:
    """Return whether to build the CUDA extension: $PG_KERNELS_CUDA (1 or 0), else whether a GPU's driver and nvcc are found.

    Without a GPU the build would take minutes for kernels that cannot run.
    """
    wanted = os.environ.get("PG_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"PG_KERNELS_CUDA: got {wanted!r}, expected 1 or 0")
    if wanted == "1" and nvcc() is None:
        raise SystemExit("PG_KERNELS_CUDA=1, but there is no nvcc; NVCC=path says where it is")
    driver = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))  # Linux, and Windows' Linux
    return wanted == "1" or (wanted == "" and sys.platform == "linux" and driver and nvcc() is not None)


class BuildExtension(build_ext):
    """Add a file's own flags; if the compiler lacks one of them, the file compiles to nothing. Compile CUDA files with nvcc."""

    def build_extension(self, ext: Any) -> None:
        if ext.name == CUDA:
            self.build_cuda(ext)
        else:
            self.build_cpu(ext)

    def build_cuda(self, ext: Any) -> None:
        compiler = nvcc()
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        flags += [f"-I{path}" for path in ext.include_dirs] + [f"-D{name}={value}" for name, value in ext.define_macros]

        def compile_file(source: str) -> str:
            target = str(folder / f"{Path(source).name}.o")
            gpus = [flag for gpu in GPUS for flag in ("-gencode", gpu)] if source.endswith(".cu") else []
            self.spawn([compiler, *flags, *gpus, "-c", source, "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_file, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Link CUDA's runtime statically: one build works with every torch, and loads on machines without a GPU.
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
    # Rebuild when a header changes, and put headers into the source distribution.
    depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
    include_dirs=["csrc"],
    libraries=["dl"] if sys.platform == "linux" else [],
    cxx_std=17,
    # Compilers differ in whether they fuse a product and a sum, but results must not. Floating-point exceptions are not needed:
    # to keep them, GCC leaves loops with comparisons scalar where vectors have no masks (AVX2).
    extra_compile_args=[*LEVEL, "-ffp-contract=off", "-fno-trapping-math"],
    # Without a working compiler the package still installs, and ops run on their other backends.
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

# These folders are installed as packages of pg_kernels.
FOLDERS = {"pg_kernels.model": "model", "pg_kernels.benchmarks": "benchmarks"}

ParallelCompile(default=0).install()  # one compiler for each core
setup(
    packages=find_packages(include=["pg_kernels", "pg_kernels.*"])
    + [
        name
        for package in FOLDERS
        for name in (package, *(f"{package}.{sub}" for sub in find_packages(FOLDERS[package])))
    ],
    package_dir=FOLDERS,
    ext_modules=[cpu_extension, *([cuda_extension] if builds_cuda() else [])],
    cmdclass={"build_ext": BuildExtension},
)
