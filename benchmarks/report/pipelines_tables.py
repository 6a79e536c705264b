"""Tables of the suites diffusers and gpu-diffusers: one for each network and batch size."""

from collections.abc import Callable, Sequence

from benchmarks.report.cells import Table, number, select, warning, where
from benchmarks.rows import Row

SUITE = "diffusers"
NOTE = (
    "A step of the transformer. By sample: ours; the given share of samples reuses the residual of its later blocks. "
    "Over the least: time over that of the plain network's parts on the rows that run alone (median of rounds, "
    "20 to 80 %). As steps: the number of plain steps that take as long. Whole batch: "
    "diffusers' own first-block cache, one decision for all samples. "
)


def tables(rows: Sequence[Row]) -> list[Table]:
    return tables_of(select(rows, SUITE, "step"), where)


def tables_of(rows: Sequence[Row], place: Callable[[Sequence[Row]], str]) -> list[Table]:
    """place: describes the machine of the rows, for titles."""
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
