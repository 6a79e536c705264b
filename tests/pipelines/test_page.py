"""The page for users: its classes are those that are tested, its policies exist, its examples and picture are real.

python tests/pipelines/test_page.py      writes the list of classes and the picture again
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import adadiff
from adadiff.policies.spelling import reuse_or_exit_policy_from
from pipelines.pipes import arguments, draw, pipeline
from pipelines.test_classes import OTHERS
from pipelines.zoo import CASES, kind_of

PAGE = Path(adadiff.__file__).parent / "pipelines" / "README.md"
PICTURE = PAGE.parent / "run.png"
BEGIN, END = "<!-- classes:begin -->\n", "<!-- classes:end -->"
LANES, STEPS, THRESHOLD = 6, 8, 0.35


def classes() -> str:
    """The part of the page between its marks."""
    tested = sorted({kind_of(name).__name__ for name in CASES})
    refused = sorted(f"`{name}` ({why.removeprefix('refused: ')})" for name, why in OTHERS.items() if "refused" in why)
    return f"{', '.join(f'`{name}`' for name in tested)}.\n\nRefused: {', '.join(refused)}.\n"


def picture(path: Path) -> None:
    pipe = pipeline("flux")
    record = adadiff.enable(pipe, f"cache:threshold={THRESHOLD}")
    draw(pipe, "flux", range(LANES), STEPS)
    record.picture(path)


def test_the_classes_are_those_that_pass() -> None:
    assert PAGE.read_text().split(BEGIN)[1].split(END)[0] == classes(), "run python tests/pipelines/test_page.py"
    assert len(set(re.findall(r"`(\w+)`", classes()))) >= 40


def test_the_policies_exist() -> None:
    named = [line.split("|")[1].strip(" `") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(named) == 7
    for policy in named:
        if not policy.endswith(".json"):
            assert reuse_or_exit_policy_from(policy) is not None


def test_the_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", PAGE.read_text())
    assert len(targets) >= 2
    assert all((PAGE.parent / target.partition("#")[0]).exists() for target in targets)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with a pipeline that takes labels for prompts, fewer steps, and a threshold that it can reach."""
    monkeypatch.chdir(tmp_path)
    made = pipeline("dit")

    class Labelled(type(made)):
        def __call__(self, prompts: Any = None, **given: Any) -> Any:
            labels = {} if prompts is None else {"class_labels": prompts}
            return super().__call__(**labels, **{**given, "num_inference_steps": 4})

    made.__class__ = Labelled
    names = {"pipe": made, "prompts": list(range(6))}
    examples = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example, names)
    assert names["found"].cache.budget == 0.6
    assert len(names["images"]) == 6
    assert "cache:budget=0.6" in adadiff.summary(made)


def test_the_picture_is_of_such_a_run(tmp_path: Path) -> None:
    picture(tmp_path / "run.png")
    shown, drawn = (
        np.asarray(Image.open(path).convert("L").resize((80, 60)), dtype=float)
        for path in (PICTURE, tmp_path / "run.png")
    )
    assert np.abs(shown - drawn).mean() < 3, "run python tests/pipelines/test_page.py"
    assert drawn.min() < 100 < 250 < drawn.max()


def test_arguments_of_calls_may_be_prompts() -> None:
    pipe = pipeline("flux")
    given = [{k: v for k, v in arguments("flux", [i]).items() if k != "generator"} for i in range(4)]
    found = adadiff.calibrate(pipe, given, 0.7, num_inference_steps=4, progress=False)
    assert found.cache.held_out.prompts == 2


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + classes() + END + rest.split(END)[1])
    picture(PICTURE)
