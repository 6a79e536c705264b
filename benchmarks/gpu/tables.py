"""GPU rows as tables."""

from collections.abc import Callable, Iterable, Sequence

from benchmarks.report import pipelines_tables
from benchmarks.report.cells import Table, number, select, warning
from benchmarks.rows import Row

BATCHES_ON_A_PAGE = (8, 64)


def device(rows: Sequence[Row]) -> str:
    row = rows[0]
    versions = row["versions"]
    return f"{row['machine']['gpu']}, torch {versions['torch']}, Triton {versions.get('triton', 'none')}"


def mark(row: Row) -> str:
    return "" if row["usable"] else " (!)"


def grid(
    rows: Sequence[Row], line: Callable[[Row], str], column: Callable[[Row], object], cell: Callable[[Row], str]
) -> tuple[list[str], list[list[str]]]:
    """Names of the columns; for each line its name and cells."""
    cells = {(line(row), column(row)): cell(row) + mark(row) for row in rows}
    columns = sorted({column(row) for row in rows})
    lines = dict.fromkeys(line(row) for row in rows)
    return [str(key) for key in columns], [[name, *(cells.get((name, key), "") for key in columns)] for name in lines]


def ceilings(rows: Sequence[Row]) -> list[Table]:
    found = [row for row in rows if row["suite"] == "gpu-ceilings"]
    body = []
    for row in found:
        rate = f"{row['gb_per_second']:.0f} GB/s" if "gb_per_second" in row else f"{row['tflops']:.0f} TFLOP/s"
        body.append((row["variant"], rate + mark(row)))
    note = "Copy: bytes read and bytes written. Product: bfloat16, 8192 x 8192 x 8192, normal values. "
    return [Table(device(found), ("at best", "rate"), body, note + warning(found))] if found else []


def mebibytes(row: Row) -> str:
    return number(row["peak_bytes"] / 2**20, 0) if "peak_bytes" in row else ""


def attention(rows: Sequence[Row]) -> list[Table]:
    found = select(rows, "gpu-attention", "attention")
    body = [
        (
            f"{row['parameters']['shape']}, {row['variant']}",
            str(row["parameters"]["rows"]),
            number(row["seconds"]["median"] * 1e6, 1) + mark(row),
            number(row["tflops"], 0),
            number(row["host_seconds"] * 1e6, 1),
            number(row["first_seconds"] * 1e3, 1),
            mebibytes(row),
        )
        for row in found
    ]
    header = ("attention", "rows", "µs", "TFLOP/s", "host, µs", "first call, ms", "MiB")
    note = "First call: with this number of rows, from its start on the host to its end on the device. "
    return [Table(device(found), header, body, note + warning(found))] if found else []


def passes(rows: Sequence[Row]) -> list[Table]:
    found = select(rows, "gpu-passes", "pass")
    groups: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in found:
        groups.setdefault(tuple(row["parameters"].values()), {})[row["variant"]] = row
    body = []
    for (shape, of, batch, outputs), ways in groups.items():
        fused = ways["fused"]
        added = fused["over_no_score"] - 1
        tiles = {name.rpartition(" ")[2]: row for name, row in ways.items() if name.startswith("fused, tiles of")}
        body.append(
            (
                f"{shape}, P = {outputs}, {of}",
                str(batch),
                number(fused["gb_per_second"], 0) + mark(fused),
                number(fused["share_of_copy"], 0, percent=True) + missed(batch >= 64 and fused["share_of_copy"] < 0.88),
                f"{added:+.1%}" + missed(batch >= 64 and added > wanted_of_the_uem(outputs)),
                " / ".join(f"{number(row['share_of_copy'], 0, percent=True)} at {tile}" for tile, row in tiles.items()),
                *(
                    number(ways[name]["share_of_copy"], 0, percent=True) if name in ways else ""
                    for name in ("eager", "compiled")
                ),
            )
        )
    header = ("residual_uem", "batch", "GB/s", "of a copy", "the UEM adds", "in tiles of", "eager", "compiled")
    note = (
        "Bytes: x and branch read, sum and normalised rows written. Of a copy: a copy of 1 GiB in the same rounds; "
        "PyTorch's bytes are counted as if it had fused them, too. In tiles of: a map's share of a copy at so many "
        "tokens per program. Targets from batch 64 on: 88 % of a copy; the UEM adds at most 3 % with one output, 10 % "
        "with a map; * marks a miss. "
    )
    return [Table(device(found), header, body, note + warning(found))] if found else []


def missed(does: bool) -> str:
    return " *" if does else ""


def wanted_of_the_uem(outputs: int) -> float:
    """The target: the largest share of time that the UEM adds to the pass."""
    return 0.03 if outputs == 1 else 0.10


def decision(rows: Sequence[Row]) -> list[Table]:
    tables = []
    if found := select(rows, "gpu-decision", "decision"):
        columns, body = grid(
            found,
            lambda row: row["variant"],
            lambda row: (row["parameters"]["batch"], row["parameters"]["exiting"]),
            lambda row: f"{row['seconds']['median'] * 1e6:.1f}",
        )
        header = ("rows exit, µs", *columns)
        tables.append(Table(device(found), header, body, "Columns: batch, and which rows exit. " + warning(found)))
    if found := select(rows, "gpu-decision", "tail launch"):
        one, many = (row["seconds"]["median"] for row in found)
        each = (many - one) / (found[0]["launches"] - 1)
        body = [("one launch, µs", f"{each * 1e6:.2f}" + mark(found[0])), *found[0]["accepts"].items()]
        header = ("graphs that the device launches", "")
        note = "Parts of a network: whether the device can launch a graph of it. "
        tables.append(Table(device(found), header, body, note + warning(found)))
    return tables


def mlp(rows: Sequence[Row]) -> list[Table]:
    found = select(rows, "gpu-mlp", "mlp")
    columns, body = grid(
        found,
        lambda row: f"{row['parameters']['shape']}, {row['variant']}",
        lambda row: row["parameters"]["rows"],
        lambda row: f"{row['seconds']['median'] * 1e6:.1f}",
    )
    note = "In CUDA graphs. GELU: with the first matrix product; sum: the whole MLP with its residual sum. "
    return [Table(device(found), ("MLP of a block, µs; rows", *columns), body, note + warning(found))] if found else []


def serving(rows: Sequence[Row]) -> list[Table]:
    found = select(rows, "gpu-serving", "throughput")
    body = [
        (
            row["variant"],
            number(row["images_per_second"], 1) + mark(row),
            f"{row['seconds']['median'] * 1e3:.2f}",
            number(row["speedup"], 2),
            mebibytes(row),
        )
        for row in found
    ]
    if not found:
        return []
    given = found[0]["parameters"]
    title = f"{given['preset']}, capacity {given['capacity']}, {device(found)}"
    note = (
        "Saturated, mixed timesteps; samples exit after block 2 in the first half of their steps and run all blocks in "
        "the second. Speed-up: over the fastest continuous batching of the plain network. "
    )
    return [Table(title, ("serving", "images/s", "ms a tick", "speed-up", "MiB"), body, note + warning(found))]


def network(rows: Sequence[Row]) -> list[Table]:
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in select(rows, "gpu-network", "baseline") + select(rows, "gpu-network", "pattern"):
        groups.setdefault((row["parameters"]["preset"], row["parameters"]["batch"]), []).append(row)
    header = ("replayed exits", "ms", "TFLOP/s", "blocks", "speed-up", "of attainable", "of FLOP ideal", "MiB")
    note = (
        "Speed-up: over the fastest plain network. Of attainable: the time of a graph of the plain network's fastest "
        "pieces on exactly the remaining rows, over the measured time. "
    )
    tables = []
    for (preset, batch), group in groups.items():
        body = [
            (
                row["variant"],
                f"{row['seconds']['median'] * 1e3:.3f}{mark(row)}",
                number(row["tflops"], 0),
                number(row["blocks"] / row["blocks_full"], 0, percent=True) if "blocks" in row else "",
                number(row["speedup"], 2),
                number(row.get("share_of_attainable"), 3),
                number(row.get("share_of_flop_ideal"), 3),
                mebibytes(row),
            )
            for row in group
        ]
        tables.append(Table(f"{preset}, batch {batch}, {device(group)}", header, body, note + warning(group)))
    return tables


def diffusers(rows: Sequence[Row]) -> list[Table]:
    return pipelines_tables.tables_of(select(rows, "gpu-diffusers", "step"), device)


def network_side_by_side(rows: Sequence[Row]) -> list[Table]:
    """The fastest strategy of every pattern, with two batch sizes side by side."""
    found = [row for row in select(rows, "gpu-network", "pattern") if row["parameters"]["batch"] in BATCHES_ON_A_PAGE]
    best: dict[tuple[str, int], Row] = {}
    for row in found:
        pattern = row["variant"].rpartition(", ")[0]
        place = f"{row['parameters']['preset']}, {pattern}", row["parameters"]["batch"]
        if place not in best or row["speedup"] > best[place]["speedup"]:
            best[place] = row
    batches = sorted({batch for _, batch in best})
    header = ["replayed exits"]
    for batch in batches:
        header += [f"speed-up, batch {batch}", "of attainable", "by"]
    body = []
    for line in dict.fromkeys(line for line, _ in best):
        cells = [line]
        for batch in batches:
            row = best.get((line, batch))
            cells += (
                [f"{row['speedup']:.2f}{mark(row)}", number(row["share_of_attainable"], 3), strategy(row)]
                if row
                else ["", "", ""]
            )
        body.append(cells)
    note = "Speed-up: over the fastest of the plain network eager, compiled, and either in one CUDA graph. "
    return [Table(device(found), header, body, note + warning(found))] if body else []


def strategy(row: Row) -> str:
    return row["variant"].rpartition(", ")[2]


ALL = (ceilings, attention, passes, network, serving, decision, mlp, diffusers)


def all_tables(rows: Iterable[Row]) -> list[Table]:
    rows = list(rows)
    return [table for make in ALL for table in make(rows) if table.body]
