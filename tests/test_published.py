"""What is published is what was measured: pages and pictures show the committed rows, none of a busy machine."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.baselines.alternatives import OURS
from benchmarks.report import equal_seconds_table, headline, publish
from benchmarks.report.cells import Table
from benchmarks.rows import ROOT, read

ROWS = publish.committed()


@pytest.mark.parametrize("page", publish.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_show_the_committed_rows(page: Path) -> None:
    text = page.read_text()
    assert publish.shown(page, ROWS) == text, "run python -m benchmarks.report.publish"
    assert "(!)" not in text


@pytest.mark.parametrize("name", publish.PICTURES)
def test_pictures_are_of_the_committed_rows(name: str) -> None:
    made_of, _ = publish.PICTURES[name]
    assert publish.source_of(publish.RESULTS / name) == made_of(ROWS), "run python -m benchmarks.report.publish"


@pytest.mark.parametrize("path", sorted(publish.RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_no_committed_row_is_of_a_busy_machine(path: Path) -> None:
    rows = read(path)
    assert rows
    assert all(row.get("usable", True) for row in rows)


def test_rows_of_a_busy_machine_are_left_out() -> None:
    row = next(row for row in ROWS if row.get("usable"))
    busy = {**row, "usable": False, "variant": "busy"}
    assert publish.publishable([row, busy]) == [row]
    assert publish.publishable([row, {**row, "usable": False}]) == [], "the last row of the same thing counts"


def test_a_changed_row_changes_pages_and_pictures() -> None:
    changed = json.loads(json.dumps(ROWS))
    for row in changed:
        if "seconds_per_image" in row:
            row["seconds_per_image"] *= 1.01
        for name in ("speedup", "images_per_second", "share_of_attainable", "over_best"):
            if row.get(name) is not None:
                row[name] *= 1.01
    assert {path.name for path in publish.outdated(ROWS)} == set()
    everything = {path.name for path in publish.PAGES} | set(publish.PICTURES)
    pages = {"gpu.md": "gpu-", "diffusers.md": "diffusers", "http.md": "http"}
    unmeasured = {page for page, suite in pages.items() if not any(row["suite"].startswith(suite) for row in ROWS)}
    assert {path.name for path in publish.outdated(changed)} == everything - unmeasured


def test_tables_replace_what_lies_between_the_marks() -> None:
    text = f"before\n{publish.BEGIN}\nold\n{publish.END}\nafter\n"
    assert publish.replace(text, "new\n") == f"before\n{publish.BEGIN}\nnew\n{publish.END}\nafter\n"
    for broken in ("no marks", f"{publish.END}{publish.BEGIN}", text + publish.BEGIN):
        with pytest.raises(ValueError, match="once each"):
            publish.replace(broken, "new")


def test_values_in_the_text_come_from_rows() -> None:
    text = (ROOT / "README.md").read_text()
    assert {name for _, name, _, _ in publish.VALUE.findall(text)} == set(publish.VALUES)
    claim = publish.claim(ROWS)
    assert (claim["variant"], claim["parameters"]["batch"], claim["mean_exit_layer"]) == ("spread", 64, 8.0)
    assert f"<!--value:speed-up-->{claim['speedup']:.1f}<!--end-->" in text


def test_the_table_compares_within_the_same_time() -> None:
    """Each cell has the smallest error of all settings that keep to its share of the full network's time."""
    (table,) = equal_seconds_table.tables(ROWS)
    timed = [p for p in equal_seconds_table.points(ROWS, equal_seconds_table.DATA) if p.seconds is not None]
    full = max((p for p in timed if p.method == "fewer steps"), key=lambda p: p.steps)
    assert f"{full.seconds * 1e3:.0f} ms" in table.note
    quality = [line for line in table.body if line[0] != "which, steps"]
    kinds = {
        "fewer steps": {"fewer steps", "plain network"},
        "best alternative": {p.method for p in timed} - set(OURS),
        "by sample": set(OURS),
    }
    assert [line[0] for line in quality] == list(kinds)
    for line in quality:
        for cell, share in zip(line[1:], (0.2, 0.4, 0.6, 0.8), strict=True):
            within = [p for p in timed if p.method in kinds[line[0]] and p.seconds <= share * full.seconds]
            assert cell.split(" ")[0] == f"{min(p.measures['error'].value for p in within) * 1e3:.1f}"


def test_the_picture_needs_its_rows() -> None:
    with pytest.raises(ValueError, match="--suite headline"):
        headline.picture([row for row in ROWS if row["suite"] != headline.SUITE])


def test_tables_as_markdown() -> None:
    table = Table("title", ("a", "b"), [("1", "2")], "note")
    assert publish.markdown(table) == "**title**\n\n| a | b |\n|---|---:|\n| 1 | 2 |\n\nnote"
    assert publish.markdown(dataclasses.replace(table, body=[])).count("|") == 6
