"""Policies of several parts in one text, and file names that hold what joins them."""

from pathlib import Path

import pytest

from adadiff.policies.cascade import Cascade
from adadiff.policies.joining import quoted, split_parts
from adadiff.policies.spelling import parts_from
from adadiff.policies.width import Width
from adadiff.policies.width_file import width_json

SCHEDULE = Width((500.0,), (1.0, 0.5))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("full", ["full"]),
        ("cache:threshold=0.1+exit:0.2", ["cache:threshold=0.1", "exit:0.2"]),
        ("width:'a+b.json'+exit:0.2", ["width:a+b.json", "exit:0.2"]),
        ('exit:0.2+cascade:"a+b",share=0.3', ["exit:0.2", "cascade:a+b,share=0.3"]),
        ('width:"it\'s+.json"', ["width:it's+.json"]),
        ("width:it's.json", ["width:it's.json"]),
        ("width:'1+1=2'", ["width:1+1=2"]),
    ],
)
def test_quotes_keep_a_name_together(text: str, parts: list[str]) -> None:
    assert split_parts(text) == parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width:a+b.json", r"no policy 'b.json' in 'width:a\+b.json': .* in quotes"),
        ("exit:0.2+cascade:a+b+c", "no policy 'b' in"),
        ("width:'a+b.json", "a quote that is not closed"),
    ],
)
def test_a_name_that_is_torn_apart_is_told(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts_from(text)


@pytest.mark.parametrize("name", ["a+b.json", "it's+.json", "'a'.json", "plain.json"])
def test_a_policy_of_a_file_spells_itself(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(width_json(SCHEDULE, {}))
    given = parts_from(f"width:{quoted(str(path))}+exit:0.2")
    assert given.width.widths == SCHEDULE.widths
    assert parts_from(str(given)) == given
    cascade = parts_from(f"cascade:{quoted(name)},share=0.3").cascade
    assert cascade == Cascade(name, 0.3)
    assert parts_from(str(cascade)).cascade == cascade
