"""Rows of the suite diffusers, and of that on a GPU, as tables: one for each network and batch."""

from collections.abc import Callable, Sequence

from benchmarks.report.cells import Table, number, select, warning, where
from benchmarks.rows import Row

SUITE = "diffusers"
NOTE = (
    "A step of the transformer. By sample: ours, the given share of the samples reuses what their later blocks added. "
    "Over the least: seconds over those of the plain network's own parts on just the rows that run (median of rounds, "
    "20 to 80 %). As steps: of the plain network that take as long, which is what fewer steps cost. Whole batch: "
    "diffusers' own first-block cache, one decision for all samples. "
)


def tables(rows: Sequence[Row]) -> list[Table]:
    return tables_of(select(rows, SUITE, "step"), where)


def tables_of(rows: Sequence[Row], place: Callable[[Sequence[Row]], str]) -> list[Table]:
    """place: what a title says of the machine."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*row["parameters"].values(), row["dtype"], row["threads"]), []).append(row)
    return [_table(group, place(group)) for group in groups.values()]


def _table(rows: Sequence[Row], place: str) -> Table:
    given = rows[0]["parameters"]
    body = [
        (
            row["variant"],
            f"{row['seconds']['median'] * 1e3:.1f}" + ("" if row["usable"] else " (!)"),
            number(row["blocks"] / row["blocks_full"], 0, percent=True),
            over_best(row),
            number(row["plain_steps"], 3),
        )
        for row in rows
    ]
    header = (f"{given['network']}, {given['blocks']} blocks", "ms", "blocks", "over the least", "as steps")
    return Table(f"batch {given['batch']}, {place}", header, body, NOTE + warning(rows))


def over_best(row: Row) -> str:
    if "over_best" not in row:
        return ""
    low, high = (f"{100 * (end - 1):+.1f}" for end in row["over_best_spread"])
    return f"{100 * (row['over_best'] - 1):+.1f} % ({low} to {high})"
