"""Imports point one way: csrc <- adadiff_kernels <- python/adadiff <- cli, inside python/adadiff from folder to folder,
too, and no module imports itself by way of others. Read from the parsed sources."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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
# What a network would import if it knew that samples may exit.
EXIT_LOGIC = {
    *("ActiveSet", "CountSnapshot", "DeviceSet", "LayerScores", "Score", "exit_rows_reference", "settle_rows"),
    *("settle_rows_reference", "take_rows", "uem_score", "uem_score_reference"),
}
# Folders and single modules of python/adadiff: each imports only those before it.
ORDER = (
    *("spelling", "diffusion", "models", "heads", "uem", "reading", "policies", "config", "model", "weights"),
    *("writing", "checkpoint"),
    *("forward", "sampling", "engine"),
    *("data", "output", "metrics", "calibration", "conversion", "pipelines", "training", "serving"),
    *("__init__", "commands", "cli", "__main__"),
)


def imports(path: Path, source: str | None = None, for_types: bool = True) -> set[str]:
    """Every import of a file as a full dotted name, relative ones resolved, imported name included. for_types: those
    that only a type checker sees, too."""
    base = ROOT / "python" if "python" in path.relative_to(ROOT).parts else ROOT
    package = path.relative_to(base).parent.parts
    names = set()
    for node in nodes(ast.parse(path.read_text() if source is None else source), for_types):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def nodes(tree: ast.AST, for_types: bool) -> Iterator[ast.AST]:
    yield tree
    for child in ast.iter_child_nodes(tree):
        only_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if for_types or not only_types:
            yield from nodes(child, for_types)
        else:
            yield from (own for other in child.orelse for own in nodes(other, for_types))


def name_of(path: Path) -> str:
    """The dotted name of a module of python/adadiff."""
    return ".".join(path.relative_to(ROOT / "python").with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in ADADIFF}


def module_of(name: str) -> str:
    """Which module of python/adadiff an import takes something from: it, or what is named in it."""
    return name if name in MODULES else name.rpartition(".")[0]


def part_of(module: str) -> str:
    """Which of ORDER a module belongs to."""
    return "__init__" if module == "adadiff" else module.split(".")[1]


def imported(path: Path, for_types: bool = True) -> set[str]:
    """The modules of python/adadiff that one of them imports."""
    return {module_of(name) for name in imports(path, for_types=for_types) if within(name, "adadiff")}


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


def test_imports_for_types_are_told_apart():
    path = ROOT / "python" / "adadiff" / "models" / "x.py"
    source = (
        "import a\nif TYPE_CHECKING:\n    from . import b\nelse:\n    import c\n"
        "if a:\n    import d\ndef f():\n    from ..uem import E\n"
    )
    real = {"a", "c", "d", "adadiff.uem.E"}
    assert imports(path, source, for_types=False) == real
    assert imports(path, source) == real | {"adadiff.models.b"}


def test_an_import_is_of_a_module():
    assert module_of("adadiff.forward.forward") == "adadiff.forward.forward"
    assert module_of("adadiff.forward.forward.run_forward") == "adadiff.forward.forward"
    assert module_of("adadiff.__version__") == "adadiff"
    assert [part_of(name) for name in ("adadiff", "adadiff.uem", "adadiff.forward.forward")] == [
        "__init__",
        "uem",
        "forward",
    ]


def test_files_are_found():
    assert all((KERNELS, ADADIFF, MODELS, CORE))


def test_the_order_names_every_folder_and_module():
    assert {part_of(name) for name in MODULES} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("path", ADADIFF, ids=short)
def test_folders_import_only_those_before_them(path):
    """So there are no circles between folders, those of type checkers included."""
    own = part_of(name_of(path))
    allowed = ORDER[: ORDER.index(own) + 1]
    assert not {module for module in imported(path) if part_of(module) not in allowed}


def test_modules_import_in_no_circle():
    """Inside a folder, either; an import inside a function counts."""
    graph = {name: imported(path, for_types=False) - {name} for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > len(graph)
    circle = ()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert not circle, " -> ".join(reversed(circle))


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
