"""A table, and what its cells, titles and notes are made of."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.rows import Row


@dataclass(frozen=True)
class Table:
    """`note` says in plain language how to read it."""

    title: str
    header: Sequence[str]
    body: Sequence[Sequence[str]]
    note: str


def select(rows: Iterable[Row], suite: str, kind: str) -> list[Row]:
    return [row for row in rows if row["suite"] == suite and row["kind"] == kind]


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
    """Empty where there is no value."""
    if value is None:
        return ""
    return f"{value:.{digits}%}" if percent else f"{value:.{digits}f}"
