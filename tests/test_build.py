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
def programs(build, tmp_path, monkeypatch) -> Path:
    """An empty PATH, to be filled, and no CUDA anywhere else."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "ADADIFF_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "CUDA", tmp_path / "cuda")
    return tmp_path


def program(folder: Path, name: str, text: str = "#!/bin/sh\nexit 1\n") -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def build_extension(build: ModuleType, folder: Path) -> None:
    extensions = [setuptools.Extension("adadiff_kernels._C", sources=[])]
    command = build.CMakeBuild(setuptools.Distribution({"ext_modules": extensions}))
    command.build_temp = command.build_lib = str(folder / "build")
    command.ensure_finalized()
    target = Path(command.get_ext_fullpath("adadiff_kernels._C"))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch()  # as if it had been built
    command.run()


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


def test_nvcc_is_found_in_order(build, programs, monkeypatch):
    assert build.find_nvcc() is None
    for place in ("cuda/bin", "", "path/bin", "home/bin", "own"):
        (programs / place).mkdir(parents=True, exist_ok=True)
        found = program(programs / place, "nvcc")
        if place == "path/bin":
            monkeypatch.setenv("CUDA_PATH", str(programs / "path"))
        if place == "home/bin":
            monkeypatch.setenv("CUDA_HOME", str(programs / "home"))
        if place == "own":
            monkeypatch.setenv("CUDACXX", str(found))
        assert build.find_nvcc() == str(found)


def test_cuda_is_built_where_nvcc_is_or_as_told(build, programs, monkeypatch):
    assert build.chosen_nvcc() is None
    monkeypatch.setenv("ADADIFF_CUDA", "0")
    assert build.chosen_nvcc() is None
    monkeypatch.setenv("ADADIFF_CUDA", "1")
    with pytest.raises(FileNotFoundError, match="ADADIFF_CUDA=1, but there is no nvcc; put it on PATH"):
        build.chosen_nvcc()
    with pytest.raises(FileNotFoundError, match=r"ADADIFF_CUDA=1, but there is no C\+\+ compiler"):
        build.extensions()
    nvcc = str(program(programs, "nvcc"))
    assert build.chosen_nvcc() == nvcc
    monkeypatch.setenv("ADADIFF_CUDA", "0")
    assert build.chosen_nvcc() is None
    monkeypatch.delenv("ADADIFF_CUDA")
    assert build.chosen_nvcc() == nvcc
    monkeypatch.setenv("ADADIFF_CUDA", "yes")
    with pytest.raises(ValueError, match="ADADIFF_CUDA must be 0 or 1, or not be set, got 'yes'"):
        build.chosen_nvcc()


@pytest.mark.parametrize(
    ("nvcc", "wish", "line"),
    [
        (False, None, "no nvcc found, building without compaction.cu"),
        (True, "0", "ADADIFF_CUDA=0, building without compaction.cu"),
        (True, None, None),
        (True, "1", None),
    ],
)
def test_the_build_is_told_of_nvcc(build, programs, tmp_path, monkeypatch, capsys, nvcc, wish, line):
    """CMake is asked to compile compaction.cu exactly where the choice says so; one line tells where it is left out."""
    program(programs, "c++")
    if nvcc:
        program(programs, "nvcc")
    if wish is not None:
        monkeypatch.setenv("ADADIFF_CUDA", wish)
    commands = []
    monkeypatch.setattr(build.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(build, "find_tool", lambda name, _: name)
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_cmake_dir=lambda: ""))
    build_extension(build, tmp_path)
    configure, compiling = commands
    cuda = [f"-DCMAKE_CUDA_COMPILER={programs / 'nvcc'}"] if line is None else []
    assert [part for part in configure if "CUDA" in part] == (["-DADADIFF_CUDA=ON", *cuda] if cuda else [])
    assert compiling[:2] == ["cmake", "--build"]
    printed = capsys.readouterr().err.splitlines()
    assert printed == ([] if line is None else [f"adadiff_kernels: {line} (PyTorch serves)"])


def test_failing_build_is_loud(build, programs, tmp_path, monkeypatch):
    failing = program(programs, "c++")
    monkeypatch.setattr(build, "find_tool", lambda *_: str(failing))
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_cmake_dir=lambda: ""))
    with pytest.raises(subprocess.CalledProcessError) as without:
        build_extension(build, tmp_path)
    assert not getattr(without.value, "__notes__", [])
    nvcc = program(programs, "nvcc")
    with pytest.raises(subprocess.CalledProcessError) as error:
        build_extension(build, tmp_path)
    assert error.value.__notes__ == [f"built with {nvcc}; ADADIFF_CUDA=0 leaves compaction.cu out"]


def test_missing_build_tool_is_named(build, programs):
    with pytest.raises(FileNotFoundError, match="pip install no_such_tool"):
        build.find_tool("no_such_tool", "BIN_DIR")


def test_import_without_extension_warns_once():
    script = """
import adadiff_kernels, torch
active = adadiff_kernels.ActiveSet(3)
active.exit_rows_where(torch.tensor([True, False, False]), 1)
print(active.row_to_lane.tolist(), adadiff_kernels.extension.core)
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
