"""Tables of the suite models: one for each batch size, a line for each network."""

from collections.abc import Sequence

from benchmarks.gpu.tables import device as gpu
from benchmarks.report.cells import Table, number, select, share, warning, where
from benchmarks.rows import Row

WAYS = {"plain, eager": "plain", "plain, compiled": "compiled", "nobody leaves": "engine", "two-phase": "two-phase"}
LAST = list(WAYS)[-1]


def models(rows: Sequence[Row]) -> list[Table]:
    groups: dict[tuple[object, ...], dict[str, dict[str, Row]]] = {}
    for row in select(rows, "models", "evaluation"):
        batch = (row["device"], row["dtype"], row["threads"], row["parameters"]["batch"])
        groups.setdefault(batch, {}).setdefault(row["parameters"]["preset"], {})[row["variant"]] = row
    header = [
        "ms, one evaluation",
        "GMACs",
        *WAYS.values(),
        "MACs run",
        "speed-up",
        *(f"MiB, {short}" for short in WAYS.values()),
    ]
    tables = []
    for (device, _, _, batch), presets in groups.items():
        body = []
        for name, ways in sorted(presets.items(), key=lambda one: one[1][LAST]["macs_full"]):
            milliseconds = {way: number(row["seconds"]["median"] * 1e3, 1) for way, row in ways.items()}
            body.append(
                (
                    name + ("" if all(row["usable"] for row in ways.values()) else " (!)"),
                    number(ways[LAST]["macs_full"] / 1e9, 2),
                    *(milliseconds.get(way, "") for way in WAYS),
                    number(ways[LAST]["macs"] / ways[LAST]["macs_full"], 0, percent=True),
                    number(ways[LAST]["speedup"], 2),
                    *(number(ways[way]["peak_bytes"] / 2**20, 1) if way in ways else "" for way in WAYS),
                )
            )
        own = [row for ways in presets.values() for row in ways.values()]
        note = (
            "Random weights. Engine: uncertainty after every block, no exits. Two-phase: every other lane exits after "
            "block 2 (at batch 1 the only one); MACs run and speed-up are its own, the latter over the faster plain "
            "network. MiB: peak allocation beyond the weights. "
        )
        place = gpu(own) if device == "cuda" else where(own)
        tables.append(Table(f"batch {batch}, {place}", header, body, note + warning(own)))
    return tables


def policies(rows: Sequence[Row]) -> list[Table]:
    """The study policy_patterns: samples of a batch with different policies."""
    own = select(rows, "network", "policy")
    if not own:
        return []
    body = [(row["variant"], number(row["seconds"]["median"], 2), number(row["speedup"], 2), share(row)) for row in own]
    note = (
        "A tick of U-ViT-S/2 in which half of the samples reuse the branches of the tick before, half reuse the rest "
        "of the network, or half run at half width. "
    )
    header = ("policies of half a batch", "seconds", "speed-up", "of attainable")
    return [Table(f"batch {own[0]['parameters']['batch']}, {where(own)}", header, body, note + warning(own))]
