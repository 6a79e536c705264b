"""U-ViT-S/2 with replayed exits in the summary: the saving of spread exits, and the cost of the engine without any."""

from collections.abc import Sequence

from benchmarks.report.cells import number, select
from benchmarks.report.sections import (
    Section,
    busy,
    columns,
    grouped,
    in_cases,
    on_most_threads,
    order_of_seconds,
    percent,
    sentence,
    times_as_fast,
)
from benchmarks.rows import Row

SUITE = "network"
MOST = 4  # comparisons shown at most: the last ones
HEADER = ("U-ViT-S/2, exits spread over blocks 3-13", "speed-up", "", "of attainable", "cost without exits")
EXPLAINED = (
    "Speed-up: over the fastest plain network. Attainable: its blocks on the remaining rows alone.",
    "Saves or costs time: the 20 to 80 % ranges of seconds do not overlap, speed-ups over 3 % apart.",
)


def section(rows: Sequence[Row]) -> Section | None:
    groups = grouped(
        on_most_threads(select(rows, SUITE, "baseline") + select(rows, SUITE, "pattern")),
        lambda row: (row["parameters"]["batch"], row["dtype"]),
    )
    several = len({dtype for _, dtype in groups}) > 1
    named = {
        f"batch {batch}{f', {dtype}' if several else ''}": {row["variant"]: row for row in group}
        for (batch, dtype), group in groups.items()
    }
    shown = {name: ways for name, ways in named.items() if {"spread", "nobody leaves"} & set(ways)}
    shown = dict(list(shown.items())[-MOST:])
    if not shown:
        return None
    body = [cells(f"{name}, random weights", ways) for name, ways in shown.items()]
    spread = [(name, ways["spread"]) for name, ways in shown.items() if "spread" in ways]
    said = meaning(list(shown.values()))
    brief = f"U-ViT-S/2, {spread[-1][0]}, spread exits: {times_as_fast(spread[-1][1])}." if spread else said[0]
    return Section([*columns(HEADER, body), *said], brief, EXPLAINED)


def cells(name: str, ways: dict[str, Row]) -> tuple[str, ...]:
    spread, nobody = ways.get("spread"), ways.get("nobody leaves")
    return (
        name,
        number(spread and spread["speedup"], 2),
        busy(spread, nobody),
        percent(spread and spread.get("share_of_attainable")),
        percent(1 / nobody["speedup"] - 1 if nobody else None, 1, "+"),
    )


def meaning(compared: Sequence[dict[str, Row]]) -> list[str]:
    """Whether exits save time, over the undisturbed comparisons."""
    saves, costs = [], []
    for ways in compared:
        fastest = next((ways.get(row["fastest_plain"]) for row in ways.values()), None)
        for name, sign, found in (("spread", -1, saves), ("nobody leaves", 1, costs)):
            if fastest and name in ways and not busy(ways[name]):
                found.append(order_of_seconds(ways[name], fastest) == sign)
    if not saves or not costs:
        return ["Not enough was measured undisturbed to say whether exits save time."]
    text = f"Exits save time {in_cases(saves, 'comparison')}; without exits the engine costs time"
    return sentence(f"{text} {in_cases(costs)}.")
