"""Builds the C++ extension and lists the packages; everything else is in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))
extension = Pybind11Extension(
    "pg_kernels._C",
    sources,
    # Rebuilds when a header changes, and puts headers into the source distribution.
    depends=headers,
    include_dirs=["csrc"],
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
)
