"""What surrounds a release agrees with it: one version, the workflow of the wheels, hooks, and forms for issues."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import adadiff
from adadiff import cli

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, TOOL = CONFIGURATION["project"], CONFIGURATION["tool"]
WHEELS = TOOL["cibuildwheel"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
INPUTS = {"textarea", "input", "dropdown", "checkboxes"}


def newest(changelog: str) -> tuple[str, str]:
    """Version and date, or "unreleased", of the first heading."""
    return re.findall(r"^## \[(\d+\.\d+\.\d+\w*)\] - (unreleased|\d{4}-\d{2}-\d{2})$", changelog, re.MULTILINE)[0]


def python_versions() -> set[str]:
    prefix = "Programming Language :: Python :: "
    return {text.removeprefix(prefix) for text in PROJECT["classifiers"] if text.startswith(prefix)}


def test_the_newest_heading_is_found() -> None:
    text = "# Changelog\n\n## [0.2.0] - 2027-01-02\n\n### Added\n\n## [0.1.0] - 2026-11-28\n"
    assert newest(text) == ("0.2.0", "2027-01-02")
    assert newest("## [1.0.0] - unreleased\n") == ("1.0.0", "unreleased")


def test_there_is_one_version() -> None:
    """It is set in the package; what has to repeat it agrees."""
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    assert TOOL["setuptools"]["dynamic"]["version"] == {"attr": "adadiff.__version__"}
    version, date = newest((ROOT / "CHANGELOG.md").read_text())
    assert adadiff.__version__ == version == CITATION["version"]
    if date != "unreleased":
        assert date == str(CITATION["date-released"])


def test_wheels_are_for_the_python_versions_that_are_promised() -> None:
    promised = python_versions()
    assert {f"cp{version.replace('.', '')}-*" for version in promised} == set(WHEELS["build"])
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(version) for version in promised)
    lowest = min(promised, key=lambda version: int(version.split(".")[1]))
    assert TOOL["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"
    assert TOOL["mypy"]["python_version"] == lowest
    assert WHEELS["environment"]["ADADIFF_CUDA"] == "0"


def test_wheels_are_tested_with_commands_that_exist() -> None:
    lines = [line.removeprefix("adadiff ") for line in WHEELS["test-command"] if line.startswith("adadiff ")]
    assert len(lines) == 2
    for line in lines:
        cli.parser().parse_args(line.split())
    assert 'python -c "import adadiff_kernels._C"' in WHEELS["test-command"]


def test_wheels_are_tested_with_a_cpu_build_that_installing_them_keeps() -> None:
    (torch,) = (text for text in PROJECT["dependencies"] if Requirement(text).name == "torch")
    command = shlex.split(WHEELS["before-test"])
    assert command == ["pip", "install", torch, "--index-url", "https://download.pytorch.org/whl/cpu"]


def test_the_workflow_builds_wheels_and_a_source_distribution() -> None:
    workflow = yaml.safe_load((GITHUB / "workflows" / "wheels.yml").read_text())
    wheels, sdist = workflow["jobs"]["wheels"], workflow["jobs"]["sdist"]
    assert {one["arch"] for one in wheels["strategy"]["matrix"]["include"]} == {"x86_64", "aarch64"}
    for job, command in ((wheels, "python -m cibuildwheel"), (sdist, "python -m build --sdist")):
        assert any(step.get("run", "").startswith(command) for step in job["steps"])
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", one) for one in used)
        assert used[-1].startswith("actions/upload-artifact@")
    assert workflow["permissions"] == {"contents": "read"}


def test_hooks_are_local_and_run_what_lint_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    recipe = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    linted = set(re.findall(r"^\t\$\(BIN\)/(.*?)(?: \$\(SOURCES\))?$", recipe, re.MULTILINE))
    hooks = {hook["entry"].removesuffix(" --force-exclude") for hook in repository["hooks"]}
    assert hooks == linted == {"ruff check", "ruff format --check", "mypy"}
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_ask_for_what_a_command_prints(path: Path) -> None:
    form: dict[str, Any] = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert asked
    assert {part["type"] for part in asked} <= INPUTS
    assert len({part["id"] for part in asked}) == len(asked)
    commands = {name for part in asked for name in re.findall(r"`adadiff (\w+)`", part["attributes"]["label"])}
    assert commands == {"info"}
    cli.parser().parse_args(["info"])
    required = [part["id"] for part in asked if part.get("validations", {}).get("required")]
    assert len(required) <= 3, "a form that is short is filled in"


def test_there_are_forms_for_bugs_and_for_questions() -> None:
    assert {path.stem for path in FORMS} == {"bug", "question"}
    assert "make test" in (GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text()
