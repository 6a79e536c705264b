"""Selects the settings worth measuring further: those near a Pareto front at equal multiply-adds.

Timing takes long, and so does drawing thousands of samples with large blocks. Each of FAMILIES has its own front: ours
and the alternatives, which are compared with each other, and of the latter the plain networks, whose multiply-adds take
less time. The best setting of each method and budget is always kept, and so is the front of fewer steps, the baseline
of all others.
"""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.report.fronts import Point, front, line_of, over_front

RUN = 90  # index of the seeds for screening, above those of all judged runs
# Factors over a front's measure within which settings are timed, and judged on many samples: the nearest first, so that
# an interrupted run has those that matter most.
TIMED = {"frechet": 1.0, "error": 1.05}
JUDGED = (TIMED, {"frechet": 1.05, "error": 1.1}, {"frechet": 1.1, "error": 1.1})
MEASURES = tuple(TIMED)
LOOPS = ("fewer steps", "plain network", "shallow network", "DuoDiff")  # run as plain networks, compiled if faster
FAMILIES: Mapping[str, Callable[[Point], bool]] = {
    "ours": lambda point: point.ours,
    "alternatives": lambda point: not point.ours,
    "loops": lambda point: point.method in LOOPS,
}


def near_a_front(points: Sequence[Point], near: Mapping[str, float]) -> list[Point]:
    """The points whose Fréchet distance or error is at most near["frechet"] or near["error"] times that of their
    family's front at the same multiply-adds, the best point of each line of the tables, and the points of fewer steps
    that no other of them beats."""
    fewer = [point for point in points if point.method == "fewer steps"]
    baseline = {id(point) for measure in MEASURES for point in front(fewer, "macs", measure)}
    kept = {i for i, point in enumerate(points) if id(point) in baseline}
    for belongs in FAMILIES.values():
        family = {i: point for i, point in enumerate(points) if belongs(point)}
        for measure in MEASURES:
            best = front(family.values(), "macs", measure)
            # the cheapest point of a front has no ratio to it, and is on the front
            ratios = {
                i: found.value if (found := over_front(p, best, "macs", measure)) else 1.0 for i, p in family.items()
            }
            kept |= {i for i, ratio in ratios.items() if ratio <= near[measure]}
            lines: dict[tuple[str, str], int] = {}
            for i in sorted(family, key=ratios.__getitem__):
                lines.setdefault((family[i].method, line_of(family[i])), i)
            kept |= set(lines.values())
    return [points[i] for i in sorted(kept)]
