"""The dataclass of a table, and formatting of its cells, titles and notes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.rows import Row

NAMES = {
    "cifar10_uvit_small": "U-ViT-S/2",
    "imagenet256_uvit_large": "U-ViT-L/2",
    "imagenet256_uvit_huge": "U-ViT-H/2",
}


@dataclass(frozen=True)
class Table:
    """note: how to read the table, in plain language."""

    title: str
    header: Sequence[str]
    body: Sequence[Sequence[str]]
    note: str


def select(rows: Iterable[Row], suite: str, kind: str) -> list[Row]:
    return [row for row in rows if row["suite"] == suite and row["kind"] == kind]


def grouped(rows: Iterable[Row], *parameters: str) -> dict[tuple[object, ...], list[Row]]:
    """Rows grouped by the values of `parameters`, then by the number of threads (last in each key)."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*(row["parameters"][name] for name in parameters), row["threads"]), []).append(row)
    return groups


def data_sets(rows: Iterable[Row], suite: str) -> list[str]:
    """Those whose quality the suite measured."""
    return list(dict.fromkeys(row["parameters"]["data"] for row in select(rows, suite, "quality")))


def share(row: Row) -> str:
    """The share of attainable, with its spread if the row has one."""
    if row.get("share_of_attainable") is None:
        return ""
    spread = row.get("share_of_attainable_spread")
    beside = f" ({spread[0]:.3f} to {spread[1]:.3f})" if spread else ""
    return number(row["share_of_attainable"], 3) + beside


def name_of(model: str) -> str:
    """The paper's name of a preset's network."""
    return NAMES.get(model, model)


def where(rows: Sequence[Row]) -> str:
    if not rows:
        return "quality"
    row = rows[0]
    torch = f"torch {row['versions']['torch']}"
    return ", ".join([row["machine"]["cpu"], f"{row['threads']} thread(s)", row["dtype"], torch])


def warning(rows: Iterable[Row]) -> str:
    bad = [row["aa_ratio"] for row in rows if not row["usable"]]
    if not bad:
        return ""
    worst = abs(max(bad, key=_off) - 1)
    return f"(!) not usable: the machine was busy, the same call measured twice differed by {worst:.0%}."


def _off(ratio: float) -> float:
    return abs(math.log(ratio))


def number(value: float | None, digits: int, percent: bool = False) -> str:
    """The value with so many digits after the point; empty for None."""
    if value is None:
        return ""
    return f"{value:.{digits}%}" if percent else f"{value:.{digits}f}"


def mark(row: Row) -> str:
    """The suffix of numbers from a row that is not usable; `warning` explains it."""
    return "" if row["usable"] else " (!)"


def load(row: Row) -> str:
    value = row["parameters"]["load"]
    return value if isinstance(value, str) else f"{value:.0%}"


def by_load(row: Row) -> tuple[bool, str]:
    """Sort key: shares of the capacity first, then bursts."""
    return isinstance(row["parameters"]["load"], str), load(row)
