"""The README's first picture in the summary: one call with the full network, with early exit and with reuse."""

from collections.abc import Sequence

from benchmarks.report.cells import number, select
from benchmarks.report.sections import Section, busy, columns, judged_speed, percent, times_as_fast
from benchmarks.rows import Row

SUITE = "headline"
FULL, EARLY, REUSE = "full network", "early exit", "reuse"


def section(rows: Sequence[Row]) -> Section | None:
    timed = {row["variant"]: row for row in select(rows, SUITE, "speed")}
    if not {FULL, EARLY} <= set(timed):
        return None
    full, early = timed[FULL], timed[EARLY]
    of = early["parameters"]
    header = (f"{of['samples']} {of['model']}, {of['steps']} steps", "seconds", "speed-up", "", "of the work")
    body = [
        (
            f"{row['variant']}, {row['way']}",
            number(row["seconds"]["median"], 2),
            number(row["speedup"], 2),
            busy(row),
            percent(row.get("macs_share", 1.0)),
        )
        for row in (full, early, *([timed[REUSE]] if REUSE in timed else []))
    ]
    said = f"Early exit against the full network: {judged_speed(early, full)}."
    return Section([*columns(header, body), said], f"{header[0]}, early exit: {times_as_fast(early)}.")
