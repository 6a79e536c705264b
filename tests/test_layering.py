"""Imports point one way: csrc <- adadiff_kernels <- python/adadiff <- cli. Read from the parsed sources."""

import ast
import re
from pathlib import Path

import pytest

import adadiff_kernels

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "adadiff_kernels").rglob("*.py"))
ADADIFF = sorted((ROOT / "python" / "adadiff").rglob("*.py"))
MODELS = sorted((ROOT / "python" / "adadiff" / "models").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
CORE = sorted(path for path in (ROOT / "csrc").iterdir() if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
ENTRY = {"cli.py", "__main__.py"}
# What a network would import if it knew that samples may leave.
EXIT_LOGIC = {"ActiveSet", "DeviceSet", "Score", "Swaps", "swap_rows", "uem_score"}


def imports(path: Path, source: str | None = None) -> set[str]:
    """Every import of a file as a full dotted name, relative ones resolved, imported name included."""
    base = ROOT / "python" if "python" in path.relative_to(ROOT).parts else ROOT
    package = path.relative_to(base).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_are_resolved():
    path = ROOT / "python" / "adadiff" / "models" / "x.py"
    source = "import adadiff.cli\nfrom . import a\nfrom ..uem import B\nfrom adadiff_kernels import C as E"
    assert imports(path, source) == {
        "adadiff.cli",
        "adadiff.models.a",
        "adadiff.uem.B",
        "adadiff_kernels.C",
    }


def test_files_are_found():
    assert all((KERNELS, ADADIFF, MODELS, CORE))


@pytest.mark.parametrize("path", KERNELS, ids=short)
def test_kernels_know_nothing_above(path):
    assert not {name for name in imports(path) if within(name, "adadiff", "benchmarks", "tests")}


@pytest.mark.parametrize("path", ADADIFF, ids=short)
def test_adadiff_uses_public_kernels_only(path):
    names = imports(path)
    public = {f"adadiff_kernels.{name}" for name in adadiff_kernels.__all__}
    assert not {name for name in names if within(name, "adadiff_kernels")} - public
    assert not {name for name in names if within(name, "benchmarks", "tests")}
    if path.name not in ENTRY:
        assert not {name for name in names if within(name, "adadiff.cli", "adadiff.__main__")}


@pytest.mark.parametrize("path", MODELS, ids=short)
def test_networks_hold_no_exit_logic(path):
    names = imports(path)
    assert not {name for name in names if within(name, "adadiff") and not within(name, "adadiff.models")}
    assert not names & {f"adadiff_kernels.{name}" for name in EXIT_LOGIC}


@pytest.mark.parametrize("path", BENCHMARKS, ids=short)
def test_benchmarks_do_not_lean_on_tests(path):
    assert not {name for name in imports(path) if within(name, "tests")}


@pytest.mark.parametrize("path", CORE, ids=short)
def test_core_has_no_python_or_torch_headers(path):
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)
    foreign = [name for name in included if re.match(r"(Python\.h|pybind11/|torch/|ATen/|c10/)", name)]
    assert all(name.startswith("pybind11/") for name in foreign)
    assert bool(foreign) == (path.name == "bindings.cpp")


def test_public_names_are_public():
    assert not [name for name in adadiff_kernels.__all__ if name.startswith("_")]
    assert len(set(adadiff_kernels.__all__)) == len(adadiff_kernels.__all__)
    assert all(hasattr(adadiff_kernels, name) for name in adadiff_kernels.__all__)
