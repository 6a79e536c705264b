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


def find_compiler() -> str | None:
    """The C++ compiler command: $CXX if its program exists, else c++, g++ or clang++ on PATH."""
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if command and shutil.which(shlex.split(command)[0]):
            return command
    return None


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
        ]
        environment = {**os.environ, "CXX": find_compiler()}
        subprocess.run(configure, check=True, env=environment)
        subprocess.run([cmake, "--build", str(build)], check=True, env=environment)
        if not target.exists():
            raise FileNotFoundError(f"the build of {ext.name} ended without writing {target}")


def extensions() -> list[Extension]:
    """The extension, or nothing (PyTorch then serves) where it cannot be compiled."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    missing = "C++ compiler" if find_compiler() is None else "Python.h" if not headers.exists() else None
    if missing:
        print(f"adadiff_kernels: no {missing} found, installing without the extension", file=sys.stderr)
        return []
    sources = [str(path) for path in sorted(CSRC.glob("*.cpp"))]
    depends = [str(path) for path in (*sorted(CSRC.glob("*.h")), CSRC / "CMakeLists.txt")]
    return [Extension("adadiff_kernels._C", sources=sources, depends=depends)]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
