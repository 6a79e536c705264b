"""Rows as tables: for the terminal (`plain`) and for the README (`markdown`)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adadiff.metrics.intervals import Interval, seed_interval
from benchmarks.gpu import tables as gpu_tables
from benchmarks.report import (
    admission_tables,
    fronts,
    head_to_head_tables,
    http_tables,
    pipelines_tables,
    serving_tables,
)
from benchmarks.report.cells import Table, number, select, share, warning, where
from benchmarks.report.model_tables import models
from benchmarks.rows import Row, key


def plain(table: Table) -> str:
    lines = [table.header, *table.body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]

    def text(line: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([table.title, *map(text, lines), table.note])


def markdown(table: Table) -> str:
    head, *body = ("| " + " | ".join(line) + " |" for line in (table.header, *table.body))
    rule = "|---|" + "---:|" * (len(table.header) - 1)
    return "\n".join([f"**{table.title}**", "", head, rule, *body, "", table.note])


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each thing measured, in the order of first occurrence."""
    found: dict[str, Row] = {}
    for row in rows:
        found[repr((key(row), row["dtype"], row["threads"] if "seconds" in row else None))] = row
    return list(found.values())


def all_tables(rows: Iterable[Row]) -> list[Table]:
    rows = latest(rows)
    makers = (
        digits,
        overhead,
        fronts.tables,
        network,
        *serving_tables.ALL,
        admission_tables.tables,
        *http_tables.ALL,
        models,
        pipelines_tables.tables,
        head_to_head_tables.tables,
        *gpu_tables.ALL,
    )
    return [table for make in makers for table in make(rows) if table.body]


def title(row: Row) -> str:
    """The method and its setting, as tables and pictures show them."""
    setting = row["parameters"]["setting"]
    if setting is None:
        return row["variant"]
    if row["variant"] in ("early exit", "fixed depth"):
        theta, _, first = setting.partition(",first=")
        from_block = f" from block {first}" if first else ""
        return f"{row['variant']}, {'θ' if row['variant'] == 'early exit' else 'as θ'} = {theta}{from_block}"
    return f"{row['variant']}, {setting}" if row["variant"] == "fewer steps" else f"{row['variant']} {setting}"


@dataclass(frozen=True)
class Quality:
    """Quality over runs. low, high: 95 % interval, by Student's t over runs if there are several, else bootstrap."""

    samples: int
    runs: int
    frechet: float
    low: float
    high: float
    mean: dict[str, float]  # of the other columns
    over_full: Interval | None  # ratio to the full network's distance with the same noises

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Quality":
        frechet = over([Interval(row["frechet"], row["frechet_low"], row["frechet_high"]) for row in rows])
        ratios = [Interval(**row["frechet_over_full"]) for row in rows if "frechet_over_full" in row]
        mean = {
            name: sum(float(row[name]) for row in rows) / len(rows)
            for name in ("mean_exit_layer", "blocks_share", "macs_share", "accuracy", "psnr_median")
            if rows[0][name] is not None
        }
        samples = rows[0]["parameters"]["samples"]
        return cls(samples, len(rows), frechet.value, frechet.low, frechet.high, mean, over(ratios) if ratios else None)


def over(runs: Sequence[Interval]) -> Interval:
    """Mean over runs and its interval by Student's t; a single run keeps its own interval."""
    return seed_interval([run.value for run in runs]) if len(runs) > 1 else runs[0]


def qualities(rows: Iterable[Row]) -> dict[str, Quality]:
    """title -> quality, with the latest checkpoints and the largest number of samples."""
    measured = select(rows, "digits", "quality")
    if not measured:
        return {}
    checkpoints = measured[-1]["parameters"]["checkpoints"]
    measured = [row for row in measured if row["parameters"]["checkpoints"] == checkpoints]
    most = max(row["parameters"]["samples"] for row in measured)
    by_title: dict[str, list[Row]] = {}
    for row in measured:
        if row["parameters"]["samples"] == most:
            by_title.setdefault(title(row), []).append(row)
    return {name: Quality.of(group) for name, group in by_title.items()}


def digits(rows: Sequence[Row]) -> list[Table]:
    good = qualities(rows)
    measured = select(rows, "digits", "speed")
    by_threads = [
        [row for row in measured if row["threads"] == n] for n in dict.fromkeys(row["threads"] for row in measured)
    ]
    return [_digits(group, good) for group in by_threads or [[]] if group or good]


def _digits(rows: Sequence[Row], good: dict[str, Quality]) -> Table:
    speed = {title(row): row for row in rows}
    header = (
        "digits, trained", "images/s", "speed-up", "exit layer", "blocks", "of attainable", "of FLOP ideal",
        "Fréchet", "95 % interval", "over full", "PSNR", "accuracy",
    )  # fmt: skip
    body = []
    for name in dict.fromkeys([*speed, *good]):
        row, quality = speed.get(name, {}), good.get(name)
        known = quality.mean if quality else {}
        ratio = quality.over_full if quality else None
        blocks = row["blocks"] / row["blocks_full"] if "blocks" in row else known.get("blocks_share")
        body.append(
            (
                name,
                number(row.get("images_per_second"), 1) + ("" if row.get("usable", True) else " (!)"),
                number(row.get("speedup"), 2),
                number(row.get("mean_exit_layer", known.get("mean_exit_layer")), 2),
                number(blocks, 0, percent=True),
                number(row.get("share_of_attainable"), 2),
                number(row.get("share_of_flop_ideal"), 2),
                number(quality and quality.frechet, 3),
                f"{quality.low:.3f} to {quality.high:.3f}" if quality else "",
                f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" if ratio else "",
                number(known.get("psnr_median"), 1),
                number(known.get("accuracy"), 1, percent=True),
            )
        )
    note = "Speed-up: over the fastest plain full network. Both shares: the higher the better, up to 1. "
    quality = next(iter(good.values()), None)
    if quality:
        runs = f"{quality.runs} runs of " if quality.runs > 1 else ""
        note += (
            f"Fréchet distance to held-out scans, {runs}{quality.samples} samples: lower is better. "
            "Over full: its ratio to the full network's from the same noises, with its 95 % interval. "
            "PSNR (dB): median, against the full network's image of the same noise. "
            "Accuracy is only a check: it rises as images lose variety. "
        )
    return Table(where(rows), header, body, note + warning(rows))


def overhead(rows: Sequence[Row]) -> list[Table]:
    measured = select(rows, "digits", "overhead")
    body = [
        (
            row["variant"],
            row["dtype"] + (" (emulated)" if row["dtype"] == "bfloat16" and not row["machine"]["bfloat16"] else ""),
            f"{row['seconds']['median'] * 1e3:.2f}" + ("" if row["usable"] else " (!)"),
            f"{row['overhead']:+.1%}",
        )
        for row in measured
    ]
    note = "Time added to the fastest plain network, without any exits, by the engine, then by uncertainty and exits. "
    return [
        Table(
            where(measured),
            ("digits, one evaluation", "dtype", "ms", "cost"),
            body,
            note + warning(measured),
        )
    ]


def network(rows: Sequence[Row]) -> list[Table]:
    groups: dict[tuple, list[Row]] = {}
    for row in select(rows, "network", "baseline") + select(rows, "network", "pattern"):
        groups.setdefault((row["parameters"]["batch"], row["dtype"], row["threads"]), []).append(row)
    header = (
        "U-ViT-S/2, CIFAR-10 shape", "seconds", "p20 to p80", "evaluations/s", "exit layer", "speed-up",
        "of attainable", "of FLOP ideal", "rows moved", "bytes",
    )  # fmt: skip
    tables = []
    for (batch, _, _), group in groups.items():
        body = [
            (
                row["variant"],
                f"{row['seconds']['median']:.3f}" + ("" if row["usable"] else " (!)"),
                f"{row['seconds']['p20']:.3f} to {row['seconds']['p80']:.3f}",
                number(row["evaluations_per_second"], 2),
                number(row.get("mean_exit_layer"), 2),
                number(row["speedup"], 2),
                share(row),
                number(row.get("share_of_flop_ideal"), 3),
                number(row.get("rows_moved"), 0),
                number(row.get("peak_bytes") and row["peak_bytes"] / row["peak_bytes_plain"], 0, percent=True),
            )
            for row in group
        ]
        note = (
            "Of attainable: the time of the plain network's fastest pieces on exactly the remaining rows, over the "
            "measured time, pair by pair (median, 20 to 80 %); 1 means that exits have no overhead. "
            "Bytes: peak allocation beyond the weights, against the plain run's. "
        )
        tables.append(Table(f"batch {batch}, {where(group)}", header, body, note + warning(group)))
    return tables
