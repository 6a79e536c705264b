"""The site: its pages are in the navigation, links lead to files and headings, commands parse, and Python runs.

A block of Python on a page of docs/ runs unless a comment `<!-- not run: why -->` stands before it. Pages that are made
of other files of the repository are tested beside these files.
"""

import argparse
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import adadiff
import adadiff_kernels
from adadiff import cli
from adadiff.data import sources
from adadiff.diffusion.solvers import solver_from
from adadiff.policies.spelling import parts_from
from sampler.shell import run

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
OWN = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))  # pages written for the site
NOT_RUN = re.compile(r"^<!-- not run: \S.* -->$")
MODULES = {
    "guides/own-policy.md": "my_policies",
    "guides/own-solver.md": "my_solvers",
    "guides/own-data.md": "my_data",
}
SHORT = {  # options that make the commands of the tutorial quick
    "info": "",
    "train": "--steps 2 --batch 2 --warmup 1",
    "sample": "--n 10 --steps 2",
    "calibrate": "--n 8 --steps 2 --batch 8",
    "inspect": "",
    "diff": "--steps 2",
    "evaluate": "--n 40 --steps 2 --resamples 5",
}


def _loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{Path(name).stem}", DOCS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = _loaded("hooks.py")
ALL = {page: HOOKS.source_of(page) for page in (*OWN, *HOOKS.ELSEWHERE)}  # page: its file in the repository


def text_of(page: str) -> str:
    return (ROOT / ALL[page]).read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def python_of(page: str) -> list[str]:
    """Blocks that run."""
    found = []
    parts = re.split(r"^```python\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for before, block in zip(parts[::2], parts[1::2], strict=False):
        last = before.rstrip().rpartition("\n")[2]
        if not NOT_RUN.match(last):
            found.append(block)
    return found


def commands_of(page: str) -> list[str]:
    """Lines `adadiff ...` of blocks of a shell, and those that another program starts, without `adadiff`, nor a
    PYTHONPATH before it."""
    shell = "\n".join(blocks(text_of(page), "bash")).replace("\\\n", " ")
    return re.findall(r"(?:^|-m |^PYTHONPATH=\. )adadiff (.*)$", shell, flags=re.MULTILINE)


def parsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


def leaves(nav: Any) -> list[str]:
    """Pages of the navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in leaves(part)]


def headings(text: str) -> set[str]:
    """As links spell them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[ -]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_the_navigation_names_every_page() -> None:
    named = leaves(CONFIG["nav"])
    assert len(named) == len(set(named))
    assert set(named) == set(ALL)
    assert {"index.md", "tutorial.md", "faq.md", "guides/serving.md", "benchmarks/equal-seconds.md"} <= set(named)


def test_every_page_of_results_and_every_card_is_on_the_site() -> None:
    for folder in ("benchmarks/results", "python/adadiff/checkpoints"):
        files = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.md")}
        assert files <= set(ALL.values())


def test_links_of_the_repository_become_links_of_the_site() -> None:
    text = "[a](../deploy/Dockerfile) [b](../python/adadiff/serving/README.md#stopping) "
    text += "`[c](d.md)` [e](https://f.g) [h](#i)"
    assert HOOKS.rewritten(text, "docs/deployment.md") == (
        "[a](files/deploy/Dockerfile) [b](guides/serving.md#stopping) `[c](d.md)` [e](https://f.g) [h](#i)"
    )
    text = "![a](run.png) [b](../../../benchmarks/results/README.md) [c](../../../docs/faq.md)\n```\n[d](e.md)\n```\n"
    assert HOOKS.rewritten(text, "python/adadiff/pipelines/README.md") == (
        "![a](../files/python/adadiff/pipelines/run.png) [b](../benchmarks/index.md) [c](../faq.md)\n"
        "```\n[d](e.md)\n```\n"
    )
    with pytest.raises(ValueError, match=r"nowhere\.md, which is no file"):
        HOOKS.rewritten("[a](nowhere.md)", "docs/index.md")


@pytest.mark.parametrize("page", ALL)
def test_links_lead_to_files_and_headings(page: str) -> None:
    source, text = ALL[page], text_of(page)
    HOOKS.rewritten(text, source)
    outside_code = "".join(HOOKS.CODE.split(text)[::2])
    for target in re.findall(r"\]\(([^)\s]+#[^)\s]+)\)", outside_code):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            linked = (ROOT / source).parent / file if file else ROOT / source
            assert anchor in headings(linked.read_text()), target


def test_headings_are_spelled_as_links() -> None:
    assert headings("# Many machines: Ray\n```\n# no\n```\n## `adadiff reproduce`") == {
        "many-machines-ray",
        "adadiff-reproduce",
    }


@pytest.mark.parametrize("page", [page for page in ALL if page != "project/changelog.md"])
def test_commands_parse(page: str) -> None:
    for line in commands_of(page):
        cli.parser().parse_args(shlex.split(line, comments=True))


def test_commands_are_found() -> None:
    assert len([line for page in ALL for line in commands_of(page)]) >= 35
    assert len(commands_of("tutorial.md")) == 11
    assert any(line.startswith("sample digits --out many") for line in commands_of("guides/ray.md"))


@pytest.mark.parametrize("page", [page for page in ALL if page != "project/changelog.md"])
def test_commands_in_sentences_exist(page: str) -> None:
    """The command is one, and so is each of its options."""
    known = parsers()
    for inline in re.findall(r"`adadiff ([^`]+)`", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)):
        command, *words = inline.split()
        if command == "COMMAND" or command.startswith("-"):
            continue
        assert command in known, inline
        for option in (word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)):
            assert option in known[command]._option_string_actions, inline


def executed(page: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module in which the blocks of the page ran, one after the other."""
    module = ModuleType(MODULES.get(page, "page"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for number, block in enumerate(python_of(page)):
        exec(compile(block, f"{page}, block {number}", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("page", [page for page in OWN if page != "tutorial.md" and python_of(page)])
def test_python_runs(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    module = executed(page, monkeypatch)
    report = vars(module).get("report")
    assert report is None or report.macs < report.macs_full, "the page shows a policy that never acts"


def test_python_is_found() -> None:
    counted = {page: len(python_of(page)) for page in OWN if python_of(page)}
    assert {"index.md", "tutorial.md", "guides/budget.md", "guides/batch-invariant.md"} <= set(counted)
    assert sum(counted.values()) >= 12
    assert not python_of("guides/ray.md")


def test_the_tutorial_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All commands but the service, in order, with few steps and samples; then its Python."""
    monkeypatch.chdir(tmp_path)
    for line in commands_of("tutorial.md"):
        command = line.split()[0]
        if command != "serve":
            shorter = re.sub(r" --(?:n|steps) \d+", "", line)
            assert run(f"{shorter} {SHORT[command]}") == 0, line
    plain, exits = (adadiff.load(f"runs/{name}/model.safetensors") for name in ("plain", "exits"))
    for name, value in plain.backbone.state_dict().items():
        assert value.equal(exits.backbone.state_dict()[name]), name
    assert (tmp_path / "plain" / "grid.png").exists()
    capsys.readouterr()
    module = executed("tutorial.md", monkeypatch)
    assert module.images.shape == (40, 1, 8, 8)
    printed = capsys.readouterr().out
    assert printed.startswith("40 samples in ")
    assert printed.count("multiply-adds, squared error") == 3


def test_own_classes_are_named_as_the_pages_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    read = {
        "guides/own-policy.md": parts_from,
        "guides/own-solver.md": solver_from,
        "guides/own-data.md": sources.SOURCES.read,
    }
    for page, module in MODULES.items():
        made = executed(page, monkeypatch)
        spelled = re.findall(rf"{module}:\S+", "\n".join(commands_of(page)))
        assert spelled
        for text in spelled:
            found = read[page](text)
            own = getattr(made, text.split(":")[1])
            assert isinstance(getattr(found, "exit", found), own)


def test_the_page_about_own_data_trains_on_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    executed("guides/own-data.md", monkeypatch)
    train, sample = commands_of("guides/own-data.md")
    assert run(f"{re.sub(r'--steps [0-9]+', '', train)} {SHORT['train']}") == 0
    assert run(f"{re.sub(r'--steps [0-9]+', '', sample)} --steps 2") == 0
    assert (tmp_path / "strokes" / "grid.png").exists()


@pytest.mark.parametrize(("package", "pages"), [(adadiff_kernels, ["kernels.md"]), (adadiff, None)])
def test_the_reference_has_every_public_name(package: ModuleType, pages: list[str] | None) -> None:
    files = pages or [path.name for path in (DOCS / "reference").glob("*.md") if path.name != "kernels.md"]
    text = "\n".join((DOCS / "reference" / name).read_text() for name in files)
    paths = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    assert all(path.split(".")[0] == package.__name__ for path in paths)
    named = [path.rpartition(".")[2] for path in paths]
    assert len(named) == len(set(named))
    assert set(package.__all__) <= set(named)


@pytest.mark.parametrize("drawing", sorted(DOCS.rglob("*.svg")), ids=lambda path: path.name)
def test_drawings_are_readable_on_light_and_dark_pages(drawing: Path) -> None:
    root = ElementTree.parse(drawing).getroot()
    assert root.get("aria-label")
    text = drawing.read_text()
    assert "prefers-color-scheme: dark" in text
    assert 'class="page"' in text, "a background of its own, whatever the page's is"
    assert not re.findall(r"(?:href|src)=|url\((?!#)", text)
    assert any(f"assets/{drawing.name})" in text_of(page) for page in OWN)


def test_nothing_is_loaded_from_other_hosts() -> None:
    assert CONFIG["theme"]["font"] is False
    assert not {"repo_url", "extra_javascript"} & set(CONFIG)
    styles = [(DOCS / name).read_text() for name in CONFIG["extra_css"]]
    assert not re.findall(r"url\(|@import", "".join(styles))


@pytest.mark.parametrize("page", ALL)
def test_sentences_stay_sentences(page: str) -> None:
    """Python-Markdown makes a heading of a line that begins with #7, and no list of one that follows a sentence."""
    before, list_item = "", re.compile(r"(?:[-*]|\d+\.) ")
    for line in re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL).splitlines():
        assert not re.match(r"#+[^# ]", line), line
        goes_on = before.strip() and not list_item.match(before.strip()) and not before.startswith("  ")
        assert not (goes_on and list_item.match(line)), line
        before = line


def test_docstrings_become_lists() -> None:
    """What is said of each parameter is an entry of its own, whatever line it stands on."""
    pytest.importorskip("griffe")
    listed = _loaded("docstrings.py").listed
    text = "Draws n.\n\nx: [B]; t, u: float [B]. on_step:\ncalled. b=False: none (see `x`).\nIt ends.\n"
    text += "Returns y.\nRaises ValueError."
    names = {"x", "t", "u", "on_step", "b"}
    assert listed(text, names) == (
        "Draws n.\n\n- `x`: [B];\n\n- `t`, `u`: float [B].\n\n- `on_step`: called.\n\n- `b=False`: none (see `x`).\n\n"
        "It ends.\n\nReturns y.\n\nRaises ValueError."
    )
    assert listed("With s:\n\n    x: y\n", {"x"}) == "With s:\n\n    x: y\n"
