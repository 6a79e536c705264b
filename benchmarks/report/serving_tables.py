"""Tables of the suite serving."""

from collections.abc import Iterable, Sequence

from benchmarks.report.cells import Table, by_load, grouped, load, mark, name_of, number, select, warning, where
from benchmarks.rows import Row

SUITE = "serving"
COMPACT_LOAD = 0.8


def throughput(rows: Sequence[Row]) -> list[Table]:
    header = (
        "saturated, mixed timesteps", "images/s", "speed-up", "s a tick", "ticks", "exit layer", "of attainable",
        "over static", "over ours", "rows moved", "unordered", "outside network",
    )  # fmt: skip
    tables = []
    for (preset, capacity, _), group in _groups(rows, "throughput", "preset", "capacity").items():
        body = [
            (
                row["variant"],
                number(row["images_per_second"], 3) + mark(row),
                number(row["speedup"], 3),
                number(row["seconds"]["median"], 3),
                str(row["seconds"]["n"]),
                number(row["mean_exit_layer"], 2),
                number(row.get("share_of_attainable"), 3),
                _percent(row.get("seconds_over_static")),
                _percent(row.get("seconds_over_ours")),
                number(row.get("rows_moved_per_tick"), 1),
                number(row.get("rows_moved_unordered"), 1),
                number(row["outside_network"], 2, percent=True),
            )
            for row in group
        ]
        note = (
            "Samples exit after block 2 in the first half of their steps and run all blocks in the second; random "
            "weights. Speed-up: over continuous batching of the plain network at its best micro-batch. Over static, "
            "over ours: time of a tick against theirs. One decision for a batch gives lanes other depths than their "
            "own (mean), or hardly ever lets them exit (all). Unordered: rows that the same exits move if lanes are in "
            "random order. Outside network: share of the tick, solver step included. "
        )
        title = f"{name_of(preset)}, capacity {capacity}, {where(group)}"
        tables.append(Table(title, header, body, note + warning(group)))
    return tables


def overhead(rows: Sequence[Row]) -> list[Table]:
    tables = []
    for (model, capacity, _), group in _groups(rows, "overhead", "model", "capacity").items():
        body = [
            (
                row["variant"],
                f"{row['seconds']['median'] * 1e3:.2f}" + mark(row),
                _percent(row["seconds_over_plain"]),
                number(row["mean_exit_layer"], 2),
                number(row["outside_network"], 1, percent=True),
            )
            for row in group
        ]
        note = "Over plain: against the plain network and solver step alone. Outside network: solver step included. "
        header = ("one tick, saturated", "ms", "over plain", "exit layer", "outside network")
        title = f"{name_of(model)}, capacity {capacity}, {where(group)}"
        tables.append(Table(title, header, body, note + warning(group)))
    return tables


def latency(rows: Sequence[Row]) -> list[Table]:
    header = (
        "requests of 10 to 30 steps", "load", "images/s", "p50, s", "p95, s", "p99, s", "exit layer",
        "rows, first block", "rows, all blocks", "holding could save",
    )  # fmt: skip
    tables = []
    for (model, clock, capacity, n, _), group in _groups(
        rows, "latency", "model", "clock", "capacity", "requests"
    ).items():
        body = [
            (
                row["variant"],
                load(row),
                number(row["images_per_second"], 3) + mark(row),
                *(number(value, 3) for value in (row["seconds"]["median"], row["p95"], row["p99"])),
                number(row["mean_exit_layer"], 2),
                number(row["rows_per_layer"][0], 1),
                number(sum(row["rows_per_layer"]) / len(row["rows_per_layer"]), 1),
                number(row.get("holding_bound"), 1, percent=True),
            )
            for row in sorted(group, key=by_load)
        ]
        note = f"{n} requests; load: share of lock step's images a second in a burst; rows: mean over ticks. "
        if clock == "virtual":
            note += (
                "Virtual clock with measured times of single blocks; the scheduler is the real one. Holding could "
                "save: the most network time that any regrouping of rows between ticks could save. "
            )
        title = f"{name_of(model)}, {clock} clock, capacity {capacity}, {where(group)}"
        tables.append(Table(title, header, body, note + warning(group)))
    return tables


def blocks(rows: Sequence[Row]) -> list[Table]:
    tables = []
    for (preset, _), group in _groups(rows, "block", "preset").items():
        sizes = sorted({row["parameters"]["rows"] for row in group})
        cells = {(row["variant"], row["parameters"]["rows"]): row for row in group}
        body = [
            [kind]
            + [
                f"{cells[kind, n]['seconds']['median'] * 1e3:.1f}" + mark(cells[kind, n]) if (kind, n) in cells else ""
                for n in sizes
            ]
            for kind in dict.fromkeys(row["variant"] for row in group)
        ]
        header = ["ms by rows", *map(str, sizes)]
        note = "One call, eager; in: in-blocks and the middle block, out: out-blocks (with a long skip). "
        tables.append(Table(f"{name_of(preset)}, {where(group)}", header, body, note + warning(group)))
    return tables


ALL = (throughput, overhead, latency, blocks)


def _groups(rows: Iterable[Row], kind: str, *parameters: str) -> dict[tuple[object, ...], list[Row]]:
    return grouped(select(rows, SUITE, kind), *parameters)


def _percent(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio - 1:+.1%}"
