"""Tables of the suite admission: one for each simulated machine."""

from collections.abc import Sequence

from benchmarks.report.cells import Table, by_load, load, number, select
from benchmarks.rows import Row

SUITE = "admission"
MACHINES = {
    "linear": "a block's time is proportional to its rows",
    "flat": "a block's time does not depend on its rows: an underused device",
}
NOTE = (
    "Nine of ten requests are shallow, one is deep. Virtual seconds, means over {runs} runs of {requests} requests, "
    "capacity {capacity}; a block of one row takes a millisecond. Slowdown: latency over that on an idle engine. "
    "Fairness: Jain's index of the slowdowns; 1 means that all are equal. "
)


def tables(rows: Sequence[Row]) -> list[Table]:
    found = select(rows, SUITE, "virtual")
    return [_table(machine, own) for machine in MACHINES if (own := [r for r in found if _of(r, "machine") == machine])]


def _table(machine: str, rows: Sequence[Row]) -> Table:
    header = (
        "starts first", "load", "mean, s", "p95, s", "shallow p50", "shallow p95", "deep p50", "deep p95", "longest",
        "slowdown p95", "fairness",
    )  # fmt: skip
    names = ("all_mean", "all_p95", "shallow_p50", "shallow_p95", "deep_p50", "deep_p95", "all_longest", "slowdown_p95")
    body = [
        (
            {"arrival": "first to arrive", "work": "least work"}[row["variant"]],
            load(row),
            *(number(row[name], 2) for name in names),
            number(row["fairness"], 2),
        )
        for row in sorted(rows, key=by_load)
    ]
    return Table(f"admission, {MACHINES[machine]}", header, body, NOTE.format(**rows[0]["parameters"]))


def _of(row: Row, name: str) -> object:
    return row["parameters"][name]
