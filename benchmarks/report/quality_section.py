"""The suite `quality` in the summary: early exit against the best of all other methods, budget by budget."""

from collections.abc import Sequence

from benchmarks.report.cells import data_sets, select
from benchmarks.report.fronts import SUITE, Point, axis_name, front_table, points
from benchmarks.report.sections import Section, busy, columns, percent, sentence
from benchmarks.rows import Row

MEASURES = {"frechet": "Fréchet distance", "error": "squared error"}
WORDS = {"below": "better", "above": "worse", "on it": "equal"}  # verdict in the tables -> here; others are unchanged
Verdicts = dict[str, tuple[str, str]]  # budget -> ratio with its interval, verdict


def sections(rows: Sequence[Row]) -> dict[str, Section]:
    """By data set."""
    return {data: section(rows, data) for data in data_sets(rows, SUITE)}


def section(rows: Sequence[Row], data: str) -> Section:
    found = points(rows, data)
    timed = [point for point in found if point.seconds is not None]
    axis, compared = ("seconds", timed) if timed else ("macs", found)
    kind = "speed" if timed else "quality"
    measured = [row for row in select(rows, SUITE, kind) if row["parameters"]["data"] == data]
    mark = busy(*measured) if timed else ""
    by_measure = {measure: verdicts(compared, measured, data, measure, axis) for measure in MEASURES}
    budgets = list(dict.fromkeys(budget for own in by_measure.values() for budget in own))
    at_equal = f"at equal {axis_name(axis)}"
    counts = {measure: counted(own) for measure, own in by_measure.items()}
    brief = f"{data}, early exit {at_equal}, {MEASURES['frechet']}: {counts['frechet']}."
    if not budgets:
        return Section([f"{data}: no early exit was compared."], f"{data}: no early exit was compared.")
    header = (data, *(f"{name} over the others'" for name in MEASURES.values()))
    body = [(named(budget), *(cell(own.get(budget), mark) for own in by_measure.values())) for budget in budgets]
    text = (
        f"Ratio of early exit to the best other method {at_equal}, 95 % interval; below 1 is better. Each line is the "
        f"best of several settings, which favours early exit. By Fréchet distance {counts['frechet']}; by squared "
        f"error {counts['error']}."
    )
    return Section([*columns(header, body), *sentence(text)], brief)


def verdicts(found: Sequence[Point], rows: Sequence[Row], data: str, measure: str, axis: str) -> Verdicts:
    """Ratio and verdict for each budget, from the tables. rows: those that the costs come from."""
    return {line[0]: (line[6], line[7]) for line in front_table(found, rows, data, measure, axis).body}


def named(budget: str) -> str:
    try:
        return f"{percent(float(budget))} of the work"
    except ValueError:
        return budget


def cell(found: tuple[str, str] | None, mark: str) -> str:
    if found is None:
        return ""
    ratio, verdict = found
    return " ".join(filter(None, (ratio, WORDS.get(verdict, verdict), mark)))


def counted(found: Verdicts) -> str:
    words = [WORDS.get(verdict, verdict) for _, verdict in found.values()]
    return f"better in {words.count('better')} and worse in {words.count('worse')} of {len(words)}"
