"""The rows of the suite http as tables."""

from collections.abc import Sequence

from benchmarks.report.cells import Table, by_load, grouped, load, mark, name_of, number, select, warning, where
from benchmarks.rows import Row

SUITE = "http"
MIB = 2**20
SLO = "10"  # times as long as alone, of those that are shown
KINDS = {"good": "waits", "malformed": "nonsense", "slow": "slow reader", "leaves": "leaves"}


def throughput(rows: Sequence[Row]) -> list[Table]:
    header = ("bursts", "images/s", "of the engine", "processor ms a request", "added")
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
            f"{given['requests']} requests of {given['steps']} steps at once, the service's over the loopback, from "
            "another process. Of the engine: images a second over those of the engine in the same round, median. "
            "Processor time: of the process that draws; added: over the engine's. "
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
            f"{given['requests']} requests, Poisson; load: of the images a second that the engine makes of a burst. "
            f"Alone a request takes {alone} ms a step, over HTTP. "
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
            f"The same {given['requests']} requests at the same times, load {given['load']:.0%}. How many got what "
            "they waited for: images; why a body was refused; all of a stream, read at the end; of those that leave, "
            "none waits. Latencies: of the requests whose clients behave both times. Left running, open files: when "
            "all was over, files against before. "
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
    header = ("memory of the service", "requests", "first, MiB", "last, MiB", "most, MiB", "bytes a request")
    note = "Resident, after bursts, the first of them left out; bytes a request: the slope, by least squares. "
    return [Table(f"memory, {where(found)}", header, body, note)] if found else []


ALL = (throughput, latency, behaviour, memory)


def _groups(rows: Sequence[Row], kind: str) -> list[list[Row]]:
    return list(grouped(select(rows, SUITE, kind), "model", "capacity", "requests").values())


def _latencies(row: Row) -> list[str]:
    p50, p95, p99 = (number(value, 3) for value in (row["seconds"]["median"], row["p95"], row["p99"]))
    return [p50 + mark(row), p95, p99]
