"""The rows of the suite admission as tables: one for each machine."""

from collections.abc import Sequence

from benchmarks.report.cells import Table, by_load, load, number, select
from benchmarks.rows import Row

SUITE = "admission"
MACHINES = {
    "linear": "a block takes as long as it has rows",
    "flat": "a block takes as long whatever its rows: a device that is hardly busy",
}
NOTE = (
    "Nine of ten requests are shallow, one is deep. Virtual seconds, means over {runs} runs of {requests} requests, "
    "capacity {capacity}; a block of one row takes a millisecond. Slowdown: latency over that on an idle engine. "
    "Fairness: Jain's index of the slowdowns, 1 where all are slowed down alike. "
)


def tables(rows: Sequence[Row]) -> list[Table]:
    found = select(rows, SUITE, "virtual")
    return [_table(machine, own) for machine in MACHINES if (own := [r for r in found if _of(r, "machine") == machine])]


def _table(machine: str, rows: Sequence[Row]) -> Table:
    header = (
        "begins first", "load", "mean, s", "p95, s", "shallow p50", "shallow p95", "deep p50", "deep p95", "longest",
        "slowdown p95", "fairness",
    )  # fmt: skip
    names = ("all_mean", "all_p95", "shallow_p50", "shallow_p95", "deep_p50", "deep_p95", "all_longest", "slowdown_p95")
    body = [
        (
            {"arrival": "who came first", "work": "the least work"}[row["variant"]],
            load(row),
            *(number(row[name], 2) for name in names),
            number(row["fairness"], 2),
        )
        for row in sorted(rows, key=by_load)
    ]
    return Table(f"admission, {MACHINES[machine]}", header, body, NOTE.format(**rows[0]["parameters"]))


def _of(row: Row, name: str) -> object:
    return row["parameters"][name]
