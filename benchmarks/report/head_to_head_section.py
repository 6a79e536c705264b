"""Other packages and methods beside ours, in the summary: each at the setting whose seconds are nearest to AIM."""

from collections.abc import Sequence

from benchmarks.report.cells import data_sets
from benchmarks.report.head_to_head_tables import SUITE, found
from benchmarks.report.sections import Section, busy, columns, percent
from benchmarks.rows import Row

AIM = 0.6  # of the full network's seconds


def section(rows: Sequence[Row]) -> Section | None:
    body = []
    for data in data_sets(rows, SUITE):
        methods = [one for one in found(rows, data) if one.timed]
        for name in dict.fromkeys(one.name for one in methods):
            own = [one for one in methods if one.name == name]
            batch = max(own[0].timed)
            nearest = min(
                (one for one in own if batch in one.timed), key=lambda one: abs(one.timed[batch]["of_full"] - AIM)
            )
            row, quality = nearest.timed[batch], nearest.quality
            cells = f"{row['of_full']:.2f}", f"{quality['error']:.4f}", percent(quality["changed"])
            body.append((f"{data}, {name}, {nearest.setting}", *cells, busy(row)))
    if not body:
        return None
    header = ("each method's setting nearest to 0.6 of the seconds", "of full", "error", "changed by mates", "")
    return Section(columns(header, body), f"head to head: {len(body)} methods, see the tables.")
