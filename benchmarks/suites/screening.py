"""Which settings are worth measuring further: those near a front, at equal multiply-adds.

Seconds are dear, and so are thousands of samples where blocks are large. Settings have a front for each of FAMILIES, so
that nobody goes unmeasured because others are far better, or because a multiply-add of theirs takes longer than one of
others. Of every method and budget the best setting stays in any case, and of fewer steps, which all else is compared
with, every setting.
"""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.report.fronts import Point, front, line_of, over_front

RUN = 90  # of the seeds that screen; no judged run has so many before it
JUDGED, TIMED = 1.1, 1.05  # times a front's measure: what is judged by many samples, and what is timed
MEASURES = ("frechet", "error")
LOOPS = ("fewer steps", "plain network", "shallow network", "DuoDiff")  # run as plain networks, compiled where faster
FAMILIES: Mapping[str, Callable[[Point], bool]] = {
    "composed": lambda point: point.composed,
    "ours": lambda point: point.ours and not point.composed,
    "loops": lambda point: point.method in LOOPS,
    "others": lambda point: not point.ours and point.method not in LOOPS,
}


def near_a_front(points: Sequence[Point], near: float) -> list[Point]:
    """Those whose Fréchet distance or error is at most `near` times their family's front's at the same multiply-adds,
    and the best of each line of the tables."""
    kept = {i for i, point in enumerate(points) if point.method == "fewer steps"}
    for belongs in FAMILIES.values():
        own = {i: point for i, point in enumerate(points) if belongs(point)}
        for measure in MEASURES:
            best = front(own.values(), "macs", measure)
            # a front's cheapest point has nothing to be compared with: it is on the front
            ratios = {
                i: found.value if (found := over_front(p, best, "macs", measure)) else 1.0 for i, p in own.items()
            }
            kept |= {i for i, ratio in ratios.items() if ratio <= near}
            lines: dict[tuple[str, str], int] = {}
            for i in sorted(own, key=ratios.__getitem__):
                lines.setdefault((own[i].method, line_of(own[i])), i)
            kept |= set(lines.values())
    return [points[i] for i in sorted(kept)]
