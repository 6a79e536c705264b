"""Serving in the summary: images a second of full servers, and latencies of requests."""

from collections.abc import Sequence

from benchmarks.baselines.servers import LOCK_STEP, MEAN, NO_EXITS, OURS, PLAIN, STATIC
from benchmarks.report.cells import name_of, number, select
from benchmarks.report.sections import (
    Section,
    busy,
    columns,
    judged_speed,
    on_most_threads,
    percent,
    sentence,
    times_as_fast,
)
from benchmarks.report.serving_tables import COMPACT_LOAD
from benchmarks.rows import Row

SUITE = "serving"
WORDS = {
    LOCK_STEP: "plain network, batches in lock step",
    PLAIN: "plain network, continuous batching",
    STATIC: "exits by a fixed table",
    MEAN: "one exit decision for the batch",
    OURS: "early exit, each image by itself",
}
THROUGHPUT = (PLAIN, STATIC, MEAN, OURS)
LATENCY = (LOCK_STEP, MEAN, OURS)
CLOCKS = "Times of the digits are measured; those of the others are simulated from measured times of blocks."


def section(rows: Sequence[Row]) -> Section | None:
    full = on_most_threads(select(rows, SUITE, "throughput"))
    largest = max((row["parameters"]["capacity"] for row in full), default=0)
    servers = {row["variant"]: row for row in full if row["parameters"]["capacity"] == largest}
    latency = on_most_threads([r for r in select(rows, SUITE, "latency") if r["parameters"]["load"] == COMPACT_LOAD])
    lines = [*throughput(servers, largest), *latencies(latency)]
    extra = idle_engine(rows)
    if not lines:
        return Section(extra, extra[0]) if extra else None
    ours = servers.get(OURS)
    brief = f"Serving, {WORDS[OURS]}: {times_as_fast(ours)} as the plain network." if ours else lines[0]
    return Section([*lines, *meaning(servers)], brief, extra)


def throughput(servers: dict[str, Row], capacity: int) -> list[str]:
    found = [servers[name] for name in THROUGHPUT if name in servers]
    if not found:
        return []
    plain = servers.get(PLAIN)
    preset = found[0]["parameters"]["preset"]
    header = (
        f"{name_of(preset)}, random weights, {capacity} at once",
        *("images/s", "speed-up", "", "blocks run", "of attainable"),
    )
    body = [
        (
            WORDS[row["variant"]],
            number(row["images_per_second"], 3),
            number(row["speedup"], 2),
            busy(row),
            percent(row["mean_exit_layer"] / plain["mean_exit_layer"]) if plain else "",
            percent(row.get("share_of_attainable")),
        )
        for row in found
    ]
    return columns(header, body)


def latencies(rows: Sequence[Row]) -> list[str]:
    models = list(dict.fromkeys(row["parameters"]["model"] for row in rows))
    cells = {
        (row["variant"], row["parameters"]["model"]): f"{row['p95']:.2f} s {busy(row)}".rstrip()
        for row in rows
        if row["variant"] in LATENCY
    }
    if not cells:
        return []
    header = (f"95 % of requests end within, load {percent(COMPACT_LOAD)}", *(name_of(m) for m in models))
    body = [
        (WORDS[name], *(cells.get((name, model), "") for model in models))
        for name in LATENCY
        if any(key[0] == name for key in cells)
    ]
    lines = columns(header, body)
    return [*lines, CLOCKS] if any(row["parameters"]["clock"] == "virtual" for row in rows) else lines


def meaning(servers: dict[str, Row]) -> list[str]:
    ours = servers.get(OURS)
    compared = [
        f"against {words}: {judged_speed(ours, servers[name])}"
        for name, words in ((PLAIN, "the plain network"), (MEAN, "one decision for the batch"))
        if ours and name in servers
    ]
    return sentence(f"Early exit, images a second, {'; '.join(compared)}.") if compared else []


def idle_engine(rows: Sequence[Row]) -> list[str]:
    found = [row for row in on_most_threads(select(rows, SUITE, "overhead")) if row["variant"] == NO_EXITS]
    if not found:
        return []
    cost, mark = percent(found[-1]["seconds_over_plain"] - 1, 1, "+"), ", busy" if busy(found[-1]) else ""
    return sentence(f"Digits, a step of a full server without exits: {cost} over the plain network{mark}.")
