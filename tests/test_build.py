"""The build finds its compiler or does without, and the package imports either way."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import setuptools

from adadiff_kernels import extension

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build() -> ModuleType:
    """setup.py as a module: setup() itself runs only for a build."""
    spec = importlib.util.spec_from_file_location("adadiff_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """An empty PATH, to be filled."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def program(folder: Path, name: str, text: str = "#!/bin/sh\nexit 1\n") -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_no_compiler_is_no_error(build, programs, monkeypatch, capsys):
    assert build.find_compiler() is None
    monkeypatch.setenv("CXX", "ccache no-such-compiler")
    assert build.find_compiler() is None
    assert build.extensions() == []
    assert capsys.readouterr().err.splitlines() == [
        "adadiff_kernels: no C++ compiler found, installing without the extension"
    ]


def test_compiler_is_chosen_in_order(build, programs, monkeypatch):
    program(programs, "clang++")
    assert build.find_compiler() == "clang++"
    program(programs, "g++")
    assert build.find_compiler() == "g++"
    program(programs, "c++")
    assert build.find_compiler() == "c++"
    monkeypatch.setenv("CXX", "clang++ -stdlib=libc++")
    assert build.find_compiler() == "clang++ -stdlib=libc++"


def test_failing_build_is_loud(build, programs, tmp_path, monkeypatch):
    failing = program(programs, "c++")
    monkeypatch.setattr(build, "find_tool", lambda *_: str(failing))
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_cmake_dir=lambda: ""))
    extensions = [setuptools.Extension("adadiff_kernels._C", sources=[])]
    command = build.CMakeBuild(setuptools.Distribution({"ext_modules": extensions}))
    command.build_temp = command.build_lib = str(tmp_path / "build")
    command.ensure_finalized()
    with pytest.raises(subprocess.CalledProcessError):
        command.run()


def test_missing_build_tool_is_named(build, programs):
    with pytest.raises(FileNotFoundError, match="pip install no_such_tool"):
        build.find_tool("no_such_tool", "BIN_DIR")


def test_import_without_extension_warns_once():
    script = """
import adadiff_kernels, torch
active = adadiff_kernels.ActiveSet(3)
active.leave(torch.tensor([True, False, False]), 1)
print(active.lane.tolist(), adadiff_kernels.extension.core)
"""
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", script],
        env={**os.environ, "ADADIFF_NO_EXTENSION": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "[2, 1, 0] None\n"
    assert result.stderr.count("RuntimeWarning") == 1
    assert "PyTorch alone, without its extension: ADADIFF_NO_EXTENSION=1 is set" in result.stderr


def test_unbuilt_extension_warns_and_broken_one_raises(monkeypatch):
    monkeypatch.delenv("ADADIFF_NO_EXTENSION", raising=False)
    monkeypatch.setitem(sys.modules, "adadiff_kernels._C", None)
    with pytest.warns(RuntimeWarning, match="it was not built; install a C\\+\\+ compiler"):
        assert extension.load() is None

    def broken(name: str) -> None:
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match="undefined symbol"):
        extension.load()
