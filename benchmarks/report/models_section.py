"""The published networks in the summary: the lowest and highest speed-up of exits over networks."""

from collections.abc import Sequence

from benchmarks.report.cells import select
from benchmarks.report.sections import (
    Section,
    busy,
    columns,
    grouped,
    in_cases,
    on_most_threads,
    order_of_seconds,
    sentence,
)
from benchmarks.rows import Row

SUITE = "models"
ALONE = 1  # batch size at which every lane exits


def section(rows: Sequence[Row]) -> Section | None:
    measured = select(rows, SUITE, "evaluation")
    if not measured:
        return None
    last = measured[-1]
    measured = [row for row in measured if (row["device"], row["dtype"]) == (last["device"], last["dtype"])]
    measured = on_most_threads(measured)
    batches = grouped(measured, lambda row: row["parameters"]["batch"])
    names = list(dict.fromkeys(row["parameters"]["preset"] for row in measured))
    one = len(names) == 1
    body, said = [], []
    for batch, group in sorted(batches.items()):
        exits = "exits after block 2" if batch == ALONE else "every other lane exits"
        for variant, words in (("two-phase", exits), ("nobody leaves", "no exits")):
            if own := [row for row in group if row["variant"] == variant]:
                body.append((f"batch {batch}, {words}", *extremes(own, one)))
        said += meaning(batch, group)
    if not body:
        return None
    first = f"{names[0]}, random weights" if one else f"{len(names)} networks, random weights"
    header = (first, "speed-up", "") if one else (first, "lowest speed-up", "highest speed-up")
    return Section([*columns(header, body), *said], said[-1])


def extremes(rows: Sequence[Row], one: bool) -> tuple[str, str]:
    """The lowest and the highest speed-up with their networks; one: the only network's speed-up."""
    if one:
        return f"{rows[-1]['speedup']:.2f}", busy(rows[-1])
    ends = (choose(rows, key=lambda row: row["speedup"]) for choose in (min, max))
    return tuple(f"{row['speedup']:.2f} {row['parameters']['preset']} {busy(row)}".rstrip() for row in ends)


def meaning(batch: int, group: Sequence[Row]) -> list[str]:
    """Whether exits save time, over the networks that were measured undisturbed."""
    saves, costs = [], []
    for ways in grouped(group, lambda row: row["parameters"]["preset"]).values():
        by_name = {row["variant"]: row for row in ways if not busy(row)}
        for name, sign, found in (("two-phase", -1, saves), ("nobody leaves", 1, costs)):
            row = by_name.get(name)
            fastest = row and by_name.get(row["fastest_plain"])
            if fastest:
                found.append(order_of_seconds(row, fastest) == sign)
    if not saves or not costs:
        return [f"Batch {batch}: not enough was measured undisturbed to say whether exits save time."]
    text = f"Batch {batch}: exits save time {in_cases(saves, 'network')}; without exits the engine costs time"
    return sentence(f"{text} {in_cases(costs)}.")
