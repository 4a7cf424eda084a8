# SPDX-License-Identifier: Apache-2.0
"""Maps top-level folders to import names and compiles the CPU kernels.

Everything else is in pyproject.toml.
"""

import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# A static list of packages would have to name every operator's folder.
FOLDERS = {
    "vllm_lowbit": "vllm_lowbit",
    "vllm_lowbit.kernels": "kernels",
    "vllm_lowbit.calibrate": "calibrate",
    "vllm_lowbit.deploy": "deploy",
}

# Where an editable installation has the library.
IN_PLACE = Path("kernels/cpu/native.so")

# No contraction, no reassociation: every operation rounds as it does in torch.
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]
ISAS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    AVX2 = ["-mavx2", "-mfma", "-mf16c"]
    AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")]
    ISAS["avx2"] = ["-DLOWBIT_AVX2", *AVX2]
    ISAS["avx512"] = [
        *("-DLOWBIT_AVX512", *AVX2, *AVX512),
        "-mprefer-vector-width=512",
    ]


def is_newer(library):
    """Whether a library was built after the last change of what it is built from."""
    if not library.exists():
        return False
    sources = [Path(__file__), *Path("kernels").glob("*/*.[ch]*")]
    return library.stat().st_mtime > max(path.stat().st_mtime for path in sources)


class BuildKernels(build_ext):
    """One shared library without Python in it, one object per instruction set."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        if shutil.which(compiler[0]) is None:
            raise SystemExit(
                f"vllm-lowbit compiles its CPU kernels at installation, and the C++ "
                f"compiler {compiler[0]!r} was not found. Install the package g++ "
                "(Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) "
                "or set CXX."
            )
        flags = FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        sources = Path("kernels/cpu")
        jobs = {
            name: [f"-DLOWBIT_ISA={name}", *extra, str(sources / "isa.cpp")]
            for name, extra in ISAS.items()
        }
        jobs["entry"] = [str(sources / "entry.cpp")]

        def compile_one(name):
            output = str(folder / f"{name}.o")
            command = [*compiler, *flags, *jobs[name], "-c", "-o", output]
            subprocess.run(command, check=True)
            return output

        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # Each extra that is installed into a checkout comes here again.
        if self.editable_mode and is_newer(IN_PLACE):
            shutil.copy2(IN_PLACE, library)
            return
        # The slowest first.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, reversed(jobs)))
        # OpenMP stays unresolved: torch's runtime provides it in the process.
        link = shlex.split(os.environ.get("LDFLAGS", ""))
        subprocess.run(
            [*compiler, "-shared", *objects, *link, "-o", str(library)], check=True
        )


setup(
    package_dir=FOLDERS,
    packages=[
        package
        for name, path in FOLDERS.items()
        for package in (name, *(f"{name}.{sub}" for sub in find_packages(path)))
    ],
    ext_modules=[Extension("vllm_lowbit.kernels.cpu.native", sources=[])],
    cmdclass={"build_ext": BuildKernels},
)
