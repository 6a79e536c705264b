"""Tables of the suite http."""

from collections.abc import Sequence

from benchmarks.report.cells import Table, by_load, grouped, load, mark, name_of, number, select, warning, where
from benchmarks.rows import Row

SUITE = "http"
MIB = 2**20
SLO = "10"  # the latency limit that the table shows, in latencies of a lone request
KINDS = {"good": "waits", "malformed": "malformed", "slow": "slow reader", "leaves": "disconnects"}


def throughput(rows: Sequence[Row]) -> list[Table]:
    header = ("bursts", "images/s", "of the engine", "CPU ms per request", "added")
    tables = []
    for group in _groups(rows, "throughput"):
        given = group[0]["parameters"]
        body = [
            (
                row["variant"],
                number(row["images_per_second"], 3) + mark(row),
                number(row["throughput_over_engine"], 3),
                number(row["busy_per_request"] * 1e3, 2),
                number(row["busy_added"] * 1e3, 2),
            )
            for row in group
        ]
        note = (
            f"{given['requests']} requests of {given['steps']} steps at once; the service's come from another process "
            "over the loopback. Of the engine: images a second over the engine's in the same round, median. "
            "CPU time: of the process that draws; added: beyond the engine's. "
        )
        title = f"{name_of(given['model'])}, capacity {given['capacity']}, {where(group)}"
        tables.append(Table(title, header, body, note + warning(group)))
    return tables


def latency(rows: Sequence[Row]) -> list[Table]:
    header = ("requests of 10 to 30 steps", "load", "p50, s", "p95, s", "p99, s", f"within {SLO} times alone")
    tables = []
    for group in _groups(rows, "latency"):
        given = group[0]["parameters"]
        body = [
            (row["variant"], load(row), *_latencies(row), number(row["attained"][SLO], 1, percent=True))
            for row in sorted(group, key=by_load)
        ]
        alone = number(1e3 * group[0]["seconds_alone_per_step"], 1)
        note = (
            f"{given['requests']} requests, Poisson; load: share of the engine's images a second in a burst. "
            f"A lone request takes {alone} ms a step over HTTP. "
        )
        title = f"{name_of(given['model'])}, capacity {given['capacity']}, {where(group)}"
        tables.append(Table(title, header, body, note + warning(group)))
    return tables


def behaviour(rows: Sequence[Row]) -> list[Table]:
    header = (
        "clients", *KINDS.values(), "p50, s", "p95, s", "p99, s", "longest, s", "left running", "open files",
    )  # fmt: skip
    tables = []
    for group in _groups(rows, "behaviour"):
        given = group[0]["parameters"]
        body = [
            (
                row["variant"],
                *(f"{row['whole'][kind]} of {row['asked'][kind]}" if row["asked"][kind] else "" for kind in KINDS),
                *_latencies(row),
                number(row["longest"], 3),
                str(int(row["left_behind"]["running"] + row["left_behind"]["waiting"])),
                f"{int(row['left_behind']['files']):+d}",
            )
            for row in group
        ]
        note = (
            f"The same {given['requests']} requests at the same times, load {given['load']:.0%}. Columns of clients: "
            "how many got a complete reply: images; the reason of a refusal (malformed); a whole stream, read late "
            "(slow reader); clients that disconnect wait for none. Latencies: of the requests whose clients behave "
            "both times. Left running, open files: after the last request; files as a change from before. "
        )
        title = f"{name_of(given['model'])}, capacity {given['capacity']}, {where(group)}"
        tables.append(Table(title, header, body, note + warning(group)))
    return tables


def memory(rows: Sequence[Row]) -> list[Table]:
    found = select(rows, SUITE, "memory")
    body = [
        (
            name_of(row["parameters"]["model"]),
            f"{row['parameters']['requests']:,}",
            *(number(row[name] / MIB, 1) for name in ("first", "last", "most")),
            number(row["slope"], 0),
        )
        for row in found
    ]
    header = ("memory of the service", "requests", "first, MiB", "last, MiB", "most, MiB", "bytes per request")
    note = "Resident memory after each burst but the first; bytes per request: its slope, by least squares. "
    return [Table(f"memory, {where(found)}", header, body, note)] if found else []


ALL = (throughput, latency, behaviour, memory)


def _groups(rows: Sequence[Row], kind: str) -> list[list[Row]]:
    return list(grouped(select(rows, SUITE, kind), "model", "capacity", "requests").values())


def _latencies(row: Row) -> list[str]:
    p50, p95, p99 = (number(value, 3) for value in (row["seconds"]["median"], row["p95"], row["p99"]))
    return [p50 + mark(row), p95, p99]
