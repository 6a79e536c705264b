"""Summary of a run in at most 15 lines: results and their meaning. From rows alone."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.report import (
    digits_section,
    head_to_head_section,
    headline_section,
    http_section,
    models_section,
    network_section,
    pipelines_section,
    quality_section,
    serving_section,
)
from benchmarks.report.sections import WIDTH, Section, percent, shortened
from benchmarks.report.tables import latest
from benchmarks.rows import Row

LINES = 15
MAKERS: dict[str, Callable[[Sequence[Row]], Section | None]] = {
    "headline": headline_section.section,
    "digits": digits_section.section,
    "network": network_section.section,
    "serving": serving_section.section,
    "http": http_section.section,
    "models": models_section.section,
    "diffusers": pipelines_section.section,
    "head-to-head": head_to_head_section.section,
}
REPORT, TABLES = "report.html", "tables.txt"


def summary(rows: Iterable[Row], folder: Path) -> list[str]:
    """At most LINES lines of at most WIDTH columns; the last one gives the path of the report. folder: of the run."""
    rows = of_one_machine(list(rows))
    if not rows:
        return ["Nothing was measured.", where(folder)]
    head = [machine(rows), noise(rows)]
    found = sections(rows)
    if not found:
        head.append("What was measured has no summary; see the tables.")
    room = LINES - len(head) - 1
    blocks = fitted(found, room)
    gaps = room - sum(map(len, blocks)) > len(blocks)  # room for an empty line before each
    lines = [line for block in [head, *blocks, [where(folder)]] for line in [*block, *[""] * gaps]]
    return [shortened(line) for line in lines[: len(lines) - gaps]]


def of_one_machine(rows: Sequence[Row]) -> list[Row]:
    """The latest row of each measurement, without timings of other machines than the last row's."""
    mine = [row for row in rows if "seconds" not in row or row["machine"] == rows[-1]["machine"]]
    return latest(mine)


def sections(rows: Sequence[Row]) -> list[tuple[int, Section]]:
    """The section of each suite, and the index of its last row."""
    found = {name: section for name, make in MAKERS.items() if (section := make(rows))}
    found |= {("quality", data): section for data, section in quality_section.sections(rows).items()}
    places = {
        name: place
        for place, row in enumerate(rows)
        for name in (row["suite"], (row["suite"], row["parameters"].get("data")))
    }
    return [(places[name], section) for name, section in found.items()]


def fitted(found: Sequence[tuple[int, Section]], room: int) -> list[list[str]]:
    """The lines of each section. Without room for all, the sections measured first become brief, then are left out;
    extra lines are added if there is room for them and for empty lines."""
    blocks = {place: list(section.lines) for place, section in found}
    oldest_first = sorted(found, key=lambda one: one[0])
    for place, section in oldest_first:
        if sum(map(len, blocks.values())) > room:
            blocks[place] = [section.brief]
    for place, section in reversed(oldest_first):  # a longer section may have been shortened since
        if sum(map(len, blocks.values())) - len(blocks[place]) + len(section.lines) <= room:
            blocks[place] = list(section.lines)
    for place, _ in oldest_first:
        if sum(map(len, blocks.values())) > room:
            del blocks[place]
    for place, section in found:
        taken = sum(map(len, blocks.values())) + len(blocks) + 1
        if blocks.get(place) == section.lines and taken + len(section.extra) <= room:
            blocks[place] += section.extra
    return list(blocks.values())


def machine(rows: Sequence[Row]) -> str:
    """Describes the last row's machine, with the most threads and all data types that were timed."""
    last, timed = rows[-1], [row for row in rows if "seconds" in row] or rows
    info, threads = last["machine"], max(row["threads"] for row in timed)
    facts = (
        f"{info['cores']} core{'s' * (info['cores'] != 1)}",
        f"{threads} thread{'s' * (threads != 1)}",
        f"torch {last['versions']['torch']}",
        " and ".join(dict.fromkeys(row["dtype"] for row in timed)),
    )
    on_gpu = any(row.get("device") == "cuda" for row in timed)
    name, rest = info["gpu"] if on_gpu else info["cpu"], ", ".join(facts)
    return f"{name[: WIDTH - len(rest) - 2]}, {rest}"


def noise(rows: Sequence[Row]) -> str:
    """The largest difference of two measurements of the same call."""
    timed = [row for row in rows if "aa_ratio" in row]
    if not timed:
        return "Nothing was timed in this run."
    apart = percent(max(abs(row["aa_ratio"] - 1) for row in timed), 1)
    disturbed = sum(not row["usable"] for row in timed)
    if not disturbed:
        return f"The same call measured twice differed by at most {apart}."
    if disturbed == len(timed):
        return f"This machine was busy (same call twice: up to {apart} apart): take speeds as hints, run again."
    return f"At times this machine was busy (same call twice: up to {apart} apart): speeds marked busy are hints."


def where(folder: Path) -> str:
    """The path of the report, relative to the current folder if it lies below; long paths lose their beginning."""
    folder = folder.resolve()
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    report = str(folder / REPORT)
    line = f"Report: {report}; beside it {TABLES}, pictures, rows.jsonl"
    if len(line) <= WIDTH:
        return line
    room = WIDTH - len("Report: ")
    return f"Report: {report if len(report) <= room else '…' + report[-room + 1 :]}"
