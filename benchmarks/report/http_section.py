"""The HTTP service in the summary: its cost over the engine, and whether misbehaving clients harm others."""

from collections.abc import Sequence

from benchmarks.report.cells import name_of, number, select
from benchmarks.report.http_tables import MIB, SUITE
from benchmarks.report.sections import Section, busy, columns, on_most_threads, percent, sentence
from benchmarks.rows import Row


def section(rows: Sequence[Row]) -> Section | None:
    costs = [r for r in on_most_threads(select(rows, SUITE, "throughput")) if r["variant"] == "service"]
    said = [*behaved(rows), *flat(rows)]
    if not costs:
        return Section(sentence(" ".join(said)), said[0]) if said else None
    body = [
        (
            name_of(row["parameters"]["model"]),
            percent(row["throughput_over_engine"], 1),
            number(row["busy_added"] * 1e3, 2),
            busy(row),
        )
        for row in costs
    ]
    header = ("over HTTP", "images/s of the engine's", "processor ms a request added", "")
    return Section([*columns(header, body), *sentence(" ".join(said))], f"Over HTTP: {body[0][1]} of the engine.")


def behaved(rows: Sequence[Row]) -> list[str]:
    found = {row["variant"]: row for row in select(rows, SUITE, "behaviour")}
    mixed, calm = found.get("some do not"), found.get("all behave")
    if mixed is None or calm is None:
        return []
    kinds = ("good", "malformed", "slow")
    whole, asked = (sum(mixed[name][kind] for kind in kinds) for name in ("whole", "asked"))
    mark = f" ({busy(mixed)})" if busy(mixed) else ""
    return [
        f"Beside {mixed['asked']['leaves']} clients that disconnect, {whole} of {asked} got a complete reply; p95 "
        f"{mixed['p95']:.2f} s, {calm['p95']:.2f} s where all behave{mark}."
    ]


def flat(rows: Sequence[Row]) -> list[str]:
    return [
        f"Memory over {row['parameters']['requests']:,} requests: {row['first'] / MIB:.0f} to {row['last'] / MIB:.0f} "
        f"MiB, {row['slope']:+.0f} bytes a request."
        for row in select(rows, SUITE, "memory")[-1:]
    ]
