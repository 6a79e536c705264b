"""The guide to policies: what it shows runs, and what it names can be spelled."""

import re
from pathlib import Path

import pytest

import adadiff
from adadiff.policies.spelling import parts_from

GUIDE = (Path(adadiff.__file__).parent / "policies" / "README.md").read_text()
NAMED = re.findall(r"`((?:exit|cache|reuse|width|cascade):[^`]+)`", GUIDE)


def test_its_example_runs(capsys: pytest.CaptureFixture) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["images"].shape == (32, 1, 16, 16)
    assert capsys.readouterr().out == f"{names['report']}\n"
    assert 0 < names["report"].macs < names["report"].macs_full
    assert names["report"].reuses > 0


def test_policies_it_names_can_be_spelled() -> None:
    whole = [text for text in NAMED if not text.endswith("=") and "FILE" not in text]
    assert len(whole) >= 8
    calibration = adadiff.load("canvases").calibration
    for text in whole:
        parts_from(text, calibration)
    assert {text.partition(":")[0] for text in NAMED} == {"exit", "cache", "reuse", "width", "cascade"}
