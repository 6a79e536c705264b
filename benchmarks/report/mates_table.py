"""Table of the share of samples that change with their batch-mates, for each cache policy. From rows alone."""

from collections.abc import Sequence

from benchmarks.report.cells import Table, number, select, where
from benchmarks.rows import Row
from benchmarks.suites.mates import CHANGED, KIND, SUITE


def tables(rows: Sequence[Row], data: str) -> list[Table]:
    found = [row for row in select(rows, SUITE, KIND) if row["parameters"]["data"] == data]
    if not found:
        return []
    batches = sorted({row["parameters"]["batch"] for row in found})
    by_policy: dict[str, dict[int, Row]] = {}
    for row in found:
        by_policy.setdefault(row["variant"], {})[row["parameters"]["batch"]] = row
    body = []
    for policy, own in by_policy.items():
        shares = [number(own[batch]["changed"], 0, percent=True) if batch in own else "" for batch in batches]
        work = sum(row["macs_share"] for row in own.values()) / len(own)
        body.append((policy, *shares, number(work, 0, percent=True)))
    header = (f"{data}, changed by batch-mates", *(f"batch {batch}" for batch in batches), "work")
    given = found[-1]["parameters"]
    note = (
        f"Share of {given['samples']} samples in which a pixel (of -1 to 1) differs by more than {CHANGED:g} when they "
        f"are drawn in another order, hence in other batches; {given['steps']} DDIM steps. The number after a policy "
        "is its threshold. Work: multiply-adds as a share of the full network's. "
    )
    return [Table(where(found), header, body, note)]
