"""Builds adadiff_kernels._C from csrc/ with CMake and Ninja. Metadata is in pyproject.toml."""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
CUDA = Path("/usr/local/cuda")  # where NVIDIA's installers put it


def find_compiler() -> str | None:
    """The C++ compiler command: $CXX if its program exists, else c++, g++ or clang++ on PATH."""
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if command and shutil.which(shlex.split(command)[0]):
            return command
    return None


def find_nvcc() -> str | None:
    """nvcc: $CUDACXX, else of $CUDA_HOME or $CUDA_PATH, on PATH, or in the usual place."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    named = [os.environ.get("CUDACXX", ""), *(f"{home}/bin/nvcc" for home in homes if home)]
    for command in (*named, "nvcc", f"{CUDA}/bin/nvcc"):
        if command and (path := shutil.which(command)):
            return path
    return None


def chosen_nvcc() -> str | None:
    """The nvcc to build compaction.cu with, or None to leave it out: as ADADIFF_CUDA says, else where there is one."""
    wish = os.environ.get("ADADIFF_CUDA")
    if wish not in (None, "0", "1"):
        raise ValueError(f"ADADIFF_CUDA must be 0 or 1, or not be set, got {wish!r}")
    nvcc = None if wish == "0" else find_nvcc()
    if wish == "1" and nvcc is None:
        raise FileNotFoundError("ADADIFF_CUDA=1, but there is no nvcc; put it on PATH or name it in CUDACXX")
    return nvcc


def find_tool(name: str, folder: str) -> str:
    """Path of a build tool: from its wheel (attribute `folder` of its module), else from PATH."""
    try:
        folder_path = getattr(importlib.import_module(name), folder)  # "" in some builds of the wheel
    except ImportError:
        folder_path = ""
    path = shutil.which(name, path=folder_path or None)
    if path is None:
        raise FileNotFoundError(f"{name} is needed to build adadiff_kernels._C: pip install {name}")
    return path


class CMakeBuild(build_ext):
    """Builds the one extension; a compile error ends the installation."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        nvcc = chosen_nvcc()
        if nvcc is None:
            reason = "ADADIFF_CUDA=0" if os.environ.get("ADADIFF_CUDA") == "0" else "no nvcc found"
            print(f"adadiff_kernels: {reason}, building without compaction.cu (PyTorch serves)", file=sys.stderr)
        cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
        build = Path(self.build_temp).resolve() / "csrc"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        configure = [
            *(cmake, "--fresh", "-S", str(CSRC.resolve()), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *(["-DADADIFF_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
        ]
        environment = {**os.environ, "CXX": find_compiler()}
        try:
            subprocess.run(configure, check=True, env=environment)
            subprocess.run([cmake, "--build", str(build)], check=True, env=environment)
        except subprocess.CalledProcessError as error:
            if nvcc:
                error.add_note(f"built with {nvcc}; ADADIFF_CUDA=0 leaves compaction.cu out")
            raise
        if not target.exists():
            raise FileNotFoundError(f"the build of {ext.name} ended without writing {target}")


def extensions() -> list[Extension]:
    """The extension, or nothing (PyTorch then serves) where it cannot be compiled."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    missing = "C++ compiler" if find_compiler() is None else "Python.h" if not headers.exists() else None
    if missing:
        if os.environ.get("ADADIFF_CUDA") == "1":
            raise FileNotFoundError(f"ADADIFF_CUDA=1, but there is no {missing} to build the extension with")
        print(f"adadiff_kernels: no {missing} found, installing without the extension", file=sys.stderr)
        return []
    sources = [str(path) for path in (*sorted(CSRC.glob("*.cpp")), CSRC / "compaction.cu")]
    depends = [str(path) for path in (*sorted(CSRC.glob("*.h")), CSRC / "CMakeLists.txt")]
    return [Extension("adadiff_kernels._C", sources=sources, depends=depends)]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
