"""deploy/Dockerfile read as Docker reads it: stages, their steps in order, and what the build context holds."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("dockerfile_parse")
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


@dataclass
class Stage:
    """base: what it begins with, arguments filled in. steps: instructions and their values, as written."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [value for name, value in self.steps if name == instruction]

    def last(self, instruction: str) -> list[str]:
        """Of the last such instruction in its JSON form."""
        return json.loads(self.all(instruction)[-1])


@dataclass
class Recipe:
    """arguments: of the build, those before the first stage and those given. stages: by name, the last one is ""."""

    arguments: dict[str, str]
    stages: dict[str, Stage]

    @staticmethod
    def read(**given: str) -> "Recipe":
        found = Recipe({}, {})
        stage: Stage | None = None
        for line in DockerfileParser(fileobj=DOCKERFILE.open("rb")).structure:
            name, value = line["instruction"], line["value"]
            if name == "COMMENT":
                continue
            if name == "FROM":
                base, _, own = value.partition(" AS ")
                stage = found.stages[own] = Stage(found.fill(base))
            elif stage is not None:
                stage.steps.append((name, value))
            else:
                assert name == "ARG"
                key, _, default = value.partition("=")
                found.arguments[key] = given.get(key, found.fill(default))
        return found

    def fill(self, text: str) -> str:
        return re.sub(r"\$\{(\w+)\}", lambda match: self.arguments[match[1]], text)

    def own(self, stage: str, argument: str) -> str:
        """The default of an argument that a stage declares for itself."""
        (found,) = (value for value in self.stages[stage].all("ARG") if value.startswith(f"{argument}="))
        return found.partition("=")[2]

    def chain(self, name: str) -> list[Stage]:
        """A stage and those it is made from, the first of them from an image."""
        stage = self.stages[name]
        return [*(self.chain(stage.base) if stage.base in self.stages else ()), stage]

    def image(self, name: str) -> str:
        return self.chain(name)[0].base


def in_context(path: str) -> bool:
    """Whether .dockerignore lets a file of the repository pass: the last pattern that matches it, or a folder above it,
    decides."""
    passes = True
    parts = path.split("/")
    above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, kept = line.removeprefix("!"), line.startswith("!")
        names = parts if pattern.startswith("**/") else above
        if any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for name in names if "/" not in pattern[3:]):
            passes = kept
    return passes


def copy_steps(stage: Stage) -> list[tuple[list[str], str]]:
    """Sources, relative to the context, and target of each COPY from there."""
    found = []
    for value in stage.all("COPY"):
        words = shlex.split(value)
        if not words[0].startswith("--from"):
            found.append((words[:-1], words[-1]))
    return found


def copy_into(folder: Path, stage: Stage) -> list[str]:
    """What the COPY steps of a stage lay into its working folder, of files that .dockerignore lets pass. Returns their
    paths."""
    copied = []
    for sources, target in copy_steps(stage):
        for source in sources:
            origin = ROOT / source
            files = [origin] if origin.is_file() else sorted(path for path in origin.rglob("*") if path.is_file())
            assert files, f"COPY {source}: there is nothing"
            for file in files:
                name = str(file.relative_to(ROOT))
                if not in_context(name):
                    continue
                place = folder / target / (file.name if origin.is_file() else file.relative_to(origin))
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
                copied.append(name)
    return copied


def tracked(*folders: str) -> set[str]:
    """Files of the repository. Skips the test where it is no clone."""
    listed = subprocess.run(["git", "ls-files", "-z", *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git repository")
    return {name for name in listed.stdout.split("\0") if name and os.path.exists(ROOT / name)}
