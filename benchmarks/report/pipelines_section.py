"""Caches in diffusers' transformers, in the summary: the cost of deciding by sample over the least possible time."""

from collections.abc import Sequence

from benchmarks.report.cells import select
from benchmarks.report.pipelines_tables import SUITE
from benchmarks.report.sections import Section, busy, columns, grouped, percent, sentence
from benchmarks.rows import Row

WANTED = {0.0: 0.01}  # share of samples that reuse -> most time over the least; REST for other shares
REST = 0.04


def section(rows: Sequence[Row]) -> Section | None:
    ours = [row for row in select(rows, SUITE, "step") if "over_best" in row]
    if not ours:
        return None
    shares = sorted({row["reuse"] for row in ours})
    body = []
    for (network, batch), group in grouped(
        ours, lambda row: (row["parameters"]["network"], row["parameters"]["batch"])
    ).items():
        by_share = {row["reuse"]: row for row in group}
        cells = [percent(by_share[s]["over_best"] - 1, 1, "+") if s in by_share else "" for s in shares]
        body.append((f"{network}, batch {batch}", *cells, busy(*group)))
    header = ("over the least, by samples that reuse", *(percent(share) for share in shares), "")
    undisturbed = [row for row in ours if not busy(row)]
    met = sum(row["over_best"] - 1 <= WANTED.get(row["reuse"], REST) for row in undisturbed)
    said = "Nothing was measured undisturbed."
    if undisturbed:
        said = f"Within 1 % if no sample reuses, 4 % otherwise: {met} of {len(undisturbed)} undisturbed."
    return Section([*columns(header, body), *sentence(said)], f"diffusers, caches by sample. {said}")
