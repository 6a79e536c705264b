"""The README's table: the error of every kind of method within half of the full network's time, from rows alone."""

from collections.abc import Mapping, Sequence

from adadiff.metrics.intervals import Interval
from benchmarks.baselines.alternatives import OURS
from benchmarks.baselines.sweeps import Sweep
from benchmarks.report.cells import Table, number, where
from benchmarks.report.fronts import SUITE, Point, points
from benchmarks.rows import Row

DATA, PART = "canvases", 2
FULL = ("fewer steps", None, 20, "dpm++2m")  # method, setting, steps, solver of the full network
KINDS = {  # name of a line -> its methods; the setting with the smallest error is shown
    "fewer steps": ("fewer steps", "plain network"),
    "DuoDiff": ("DuoDiff", "shallow network"),
    "exits by timestep": ("static table", "fixed depth"),
    "exits by batch mean": ("batch mean",),
    "reuse at fixed steps": ("reuse", "static reuse"),
    "**by sample**": OURS,
}


def tables(rows: Sequence[Row]) -> list[Table]:
    timed = [point for point in points(rows, DATA) if point.seconds is not None]
    full = next((p for p in timed if (p.method, p.setting, p.steps, p.solver) == FULL), None)
    if full is None:
        return []
    limit = full.seconds / PART
    best = {name: best_within(timed, methods, limit) for name, methods in KINDS.items()}
    body = [_line(name, point) for name, point in {"full network": full, **best}.items() if point is not None]
    header = ("canvases, trained", "setting", "steps", "ms/image", "blocks a step", "error x 1000", "Fréchet")
    half = f"{_half_width(best):.0f}"
    note = (
        "Each line: the smallest error within half of the full network's time. Error: mean squared difference from the "
        f"full network's images at 100 steps, 95 % intervals. Fréchet: ±{half}."
    )
    own = [row for row in rows if (row["suite"], row["kind"]) == (SUITE, "speed") and row["parameters"]["data"] == DATA]
    return [Table(where(own), header, body, note)]


def best_within(timed: Sequence[Point], methods: Sequence[str], seconds: float) -> Point | None:
    """These methods' setting with the smallest error within `seconds` per image."""
    fast = [point for point in timed if point.method in methods and point.seconds <= seconds]
    return min(fast, key=lambda point: point.measures["error"].value, default=None)


def _half_width(best: Mapping[str, Point | None]) -> float:
    frechet = [point.measures["frechet"] for point in best.values() if point is not None]
    return sum(interval.high - interval.low for interval in frechet) / (2 * len(frechet))


def _line(name: str, point: Point) -> tuple[str, ...]:
    return (
        name,
        _setting(point),
        f"{point.steps} {point.solver}",
        number(point.seconds * 1e3, 2),
        number(point.exit_layer, 1),
        _interval(point.measures["error"]),
        number(point.measures["frechet"].value, 1),
    )


def _setting(point: Point) -> str:
    name = point.method.removeprefix("ours, ")
    if name in Sweep.aims:
        return f"`exit:budget={point.setting}`, {name}"
    return point.setting or ""


def _interval(interval: Interval) -> str:
    value, low, high = (1e3 * number for number in (interval.value, interval.low, interval.high))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"
