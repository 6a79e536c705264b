"""The README's table: the least error within shares of the full network's time, by sample and otherwise, from rows
alone."""

from collections.abc import Callable, Sequence

from adadiff.metrics.intervals import Interval
from benchmarks.baselines.sweeps import Sweep
from benchmarks.report.cells import Table, number, where
from benchmarks.report.fronts import SUITE, Point, points
from benchmarks.rows import Row

DATA = "letters"
SHARES = (0.2, 0.4, 0.6, 0.8)  # of the full network's time
FULL = ("fewer steps", None, 20, "dpm++2m")  # method, setting, steps, solver of the full network
BASELINE = "fewer steps"
# name of a line -> whether a setting belongs to it; the one of least error is shown
KINDS: dict[str, Callable[[Point], bool]] = {
    BASELINE: lambda point: point.method in ("fewer steps", "plain network"),
    "best alternative": lambda point: not point.ours,
    "by sample": lambda point: point.ours,
}
ESTIMATED = "estimated errors"  # its policy names a file of the user


def tables(rows: Sequence[Row]) -> list[Table]:
    timed = [point for point in points(rows, DATA) if point.seconds is not None]
    full = next((p for p in timed if (p.method, p.setting, p.steps, p.solver) == FULL), None)
    if full is None:
        return []
    limits = [share * full.seconds for share in SHARES]
    best = {name: [best_within(timed, belongs, limit) for limit in limits] for name, belongs in KINDS.items()}
    body = []
    for name, found in best.items():
        body.append((name, *map(_quality, found)))
        if name != BASELINE:
            body.append(("which, steps", *map(_setting, found)))
    header = (f"{DATA}, within", *(f"{share:.0%} of the time" for share in SHARES))
    half = f"{_half_width([point for found in best.values() for point in found if point]):.0f}"
    note = (
        f"The smallest error within shares of the full network's {number(full.seconds * 1e3, 0)} ms an image in "
        f"{full.steps} steps, x 1000, with 95 % intervals; after it the Fréchet distance, ±{half}. Error: mean squared "
        f"difference from its images at {Sweep.reference_steps} steps. Full network: {_quality(full)}."
    )
    own = [row for row in rows if (row["suite"], row["kind"]) == (SUITE, "speed") and row["parameters"]["data"] == DATA]
    return [Table(where(own), header, body, note)]


def best_within(timed: Sequence[Point], belongs: Callable[[Point], bool], seconds: float) -> Point | None:
    """The setting of this kind with the smallest error within `seconds` per image."""
    fast = [point for point in timed if belongs(point) and point.seconds <= seconds]
    return min(fast, key=lambda point: point.measures["error"].value, default=None)


def _half_width(shown: Sequence[Point]) -> float:
    frechet = [point.measures["frechet"] for point in shown]
    return sum(interval.high - interval.low for interval in frechet) / (2 * len(frechet))


def _quality(point: Point | None) -> str:
    if point is None:
        return ""
    return f"{_interval(point.measures['error'])}; {number(point.measures['frechet'].value, 1)}"


def _setting(point: Point | None) -> str:
    if point is None:
        return ""
    name = point.method.removeprefix("ours, ")
    parts = point.setting.split(", ") if point.setting else []
    if name in Sweep.aims:
        shown = [f"`exit:budget={parts[0]}`", *parts[1:]]
    elif name == ESTIMATED:
        shown = [f"`estimate:FILE,share={parts[0]}`", *parts[1:]]
    else:
        shown = [name, *parts]
    return ", ".join([*shown, str(point.steps)])


def _interval(interval: Interval) -> str:
    value, low, high = (1e3 * number for number in (interval.value, interval.low, interval.high))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"
