"""Quality against cost of every method, and whether ours beats all others at equal seconds. From rows alone.

A (Pareto) front holds the settings that no other setting beats in both cost and quality. Between two neighbours the
measure is interpolated as a power of the cost, as errors are powers of the number of steps; beyond the slow end of the
front it is constant.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adadiff.metrics.intervals import Interval, centred_interval, share_interval
from benchmarks.baselines.alternatives import BY_BUDGET, COMPOSED, OURS
from benchmarks.report import mates_table
from benchmarks.report.cells import Table, data_sets, number, select, warning, where
from benchmarks.rows import Row

SUITE = "quality"
MEASURES = {"frechet": "Fréchet distance", "error": "squared error", "accuracy": "accuracy"}
HIGHER = {"accuracy"}  # measures of which higher is better
COSTS = {"seconds": "ms/image", "macs": "million MACs"}
SCALE = {"seconds": 1e3, "macs": 1e-6}
ROUNDING = 5e-4  # of the tables: a ratio whose whole interval is shown as 1.000 is neither below nor above


@dataclass(frozen=True)
class Point:
    """A setting of a method. seconds: of an image, rounds: those of every round of timing; None and () if not timed.
    draws: measure -> its bootstrap draws, float [n]."""

    method: str
    setting: str | None
    steps: int
    solver: str
    seconds: float | None
    rounds: tuple[float, ...]
    macs: float  # of an image
    exit_layer: float
    measures: dict[str, Interval]
    draws: dict[str, np.ndarray]
    psnr: float

    @property
    def ours(self) -> bool:
        return self.method in OURS

    @property
    def composed(self) -> bool:
        return self.method in COMPOSED

    def cost(self, axis: str) -> float:
        """axis: "seconds" or "macs"."""
        return self.seconds if axis == "seconds" else self.macs

    def cost_draws(self, axis: str, n: int) -> np.ndarray:
        """Float [n]: medians of rounds drawn with replacement. All settings draw the same rounds, because their speeds
        drift together."""
        if axis == "macs":
            return np.full(n, self.macs)
        rounds = np.array(self.rounds)
        drawn = np.random.default_rng(len(rounds)).integers(len(rounds), size=(n, len(rounds)))
        return np.median(rounds[drawn], axis=1) * self.seconds / np.median(rounds)


def points(rows: Sequence[Row], data: str, kind: str = "quality") -> list[Point]:
    """The settings measured with the last checkpoints and the largest number of samples, averaged over runs.
    kind: "quality" or "screening"."""
    good = [row for row in select(rows, SUITE, kind) if row["parameters"]["data"] == data]
    if not good:
        return []
    last = good[-1]["parameters"]
    good = [r for r in good if r["parameters"]["checkpoints"] == last["checkpoints"]]
    most = max(r["parameters"]["samples"] for r in good)
    timed = {setting_of(row): row for row in select(rows, SUITE, "speed")}
    groups: dict[tuple, list[Row]] = {}
    for row in good:
        if row["parameters"]["samples"] == most:
            groups.setdefault(setting_of(row), []).append(row)
    return [_point(group, timed.get(key)) for key, group in groups.items()]


def setting_of(row: Row) -> tuple[object, ...]:
    given = row["parameters"]
    names = ("data", "setting", "steps", "solver", "batch", "calibrated_on")
    return row["variant"], *(given[name] for name in names), *given["checkpoints"]


def _point(runs: Sequence[Row], speed: Row | None) -> Point:
    row, mean = runs[0], lambda name: float(np.mean([float(run[name]) for run in runs]))
    draws = {name: np.mean([run[f"{name}_draws"] for run in runs], axis=0) for name in ("frechet", "error")}
    measures = {name: centred_interval(mean(name), torch.from_numpy(own)) for name, own in draws.items()}
    samples = row["parameters"]["samples"] * len(runs)
    measures["accuracy"] = share_interval(mean("accuracy"), samples)
    return Point(
        method=row["variant"],
        setting=row["parameters"]["setting"],
        steps=row["parameters"]["steps"],
        solver=row["parameters"]["solver"],
        seconds=speed and speed["seconds_per_image"],
        rounds=tuple(speed["rounds"]) if speed else (),
        macs=mean("macs"),
        exit_layer=mean("mean_exit_layer"),
        measures=measures,
        draws=draws,
        psnr=mean("psnr_median"),
    )


def front(points: Iterable[Point], axis: str, measure: str) -> list[Point]:
    """The points that no other point beats in both cost and measure, cheapest first."""
    sign = -1 if measure in HIGHER else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost(axis), sign * p.measures[measure].value)):
        if not best or sign * point.measures[measure].value < sign * best[-1].measures[measure].value:
            best.append(point)
    return best


def over_front(point: Point, others: Sequence[Point], axis: str, measure: str) -> Interval | None:
    """Ratio of the point's measure to that of a front at the same cost; None if all of the front costs more.

    The interval covers the randomness of samples and of rounds of timing, resampled in pairs. It does not cover that
    the settings were chosen on the same samples. measure: "frechet" or "error", positive.
    """
    n = len(point.draws[measure])
    slower = next((i for i, other in enumerate(others) if other.cost(axis) >= point.cost(axis)), len(others))
    if slower < len(others) and others[slower].cost(axis) == point.cost(axis):
        beside = [others[slower]]
    elif slower == 0:
        return None
    else:
        beside = list(others[slower - 1 : slower + 1])
    value = point.measures[measure].value / _between(
        point.cost(axis), [p.cost(axis) for p in beside], [p.measures[measure].value for p in beside]
    )
    draws = point.draws[measure] / _between(
        point.cost_draws(axis, n), [p.cost_draws(axis, n) for p in beside], [p.draws[measure] for p in beside]
    )
    return centred_interval(float(value), torch.from_numpy(draws))


def _between(at: np.ndarray | float, costs: Sequence, values: Sequence) -> np.ndarray | float:
    """The power law through two points, and nothing beyond them, or the value of the only one."""
    if len(costs) == 1:
        return values[0]
    way, whole = np.log(at / costs[0]), np.log(costs[1] / costs[0])
    # in some draws the two may have changed places, or be equal
    share = np.clip(np.divide(way, whole, out=np.full_like(way, 0.5), where=whole != 0), 0, 1)
    return values[0] * (values[1] / values[0]) ** share


def verdict(ratio: Interval | None) -> str:
    if ratio is None:
        return "no other so fast"
    if max(ratio.high - 1, 1 - ratio.low) < ROUNDING:
        return "on it"
    if ratio.high < 1:
        return "below"
    return "above" if ratio.low > 1 else "undecided"


def tables(rows: Sequence[Row]) -> list[Table]:
    made = []
    for data in data_sets(rows, SUITE):
        all_points = points(rows, data)
        timed = [point for point in all_points if point.seconds is not None]
        good, measured = (
            [row for row in select(rows, SUITE, kind) if row["parameters"]["data"] == data]
            for kind in ("quality", "speed")
        )
        made.append(short_table(all_points, timed, measured or good, data))
        for measure in ("frechet", "error"):
            made += [front_table(timed, measured, data, measure, "seconds")] if timed else []
            made.append(front_table(all_points, good, data, measure, "macs"))
            if any(point.composed for point in all_points):
                made += [front_table(timed, measured, data, measure, "seconds", composed=True)] if timed else []
                made.append(front_table(all_points, good, data, measure, "macs", composed=True))
        made += [best_table(timed, measured, data)] if timed else []
        made += mates_table.tables(rows, data)
    return made


def short_table(found: Sequence[Point], timed: Sequence[Point], rows: Sequence[Row], data: str) -> Table:
    """For every cost, measure and budget: our best setting over the best of all alternatives at the same cost."""
    budgets = sorted({line_of(point) for point in found if point.ours and point.method in BY_BUDGET})
    body = []
    for axis, own in (("seconds", timed), ("macs", found)):
        for measure in ("error", "frechet") if own else ():
            others = front([point for point in own if not point.ours], axis, measure)
            best = {name: _best_ratio(own, others, axis, measure, name) for name in budgets}
            body.append((f"{axis_name(axis)}, {MEASURES[measure]}", *(_in_short(best[name]) for name in budgets)))
    note = (
        "Our best setting of each budget over the best of all alternatives at the same cost: 0.81 is 19 % less. Bold: "
        "the 95 % interval does not include 1. The tables below name the settings. "
    )
    header = (f"{data}, at the same", *(f"budget {float(name):.0%}" for name in budgets))
    return Table(f"In short, {where(rows)}", header, body, note)


def _best_ratio(
    found: Sequence[Point], others: Sequence[Point], axis: str, measure: str, budget: str
) -> Interval | None:
    own = [point for point in found if point.ours and point.method in BY_BUDGET and line_of(point) == budget]
    ratios = [ratio for point in own if (ratio := over_front(point, others, axis, measure)) is not None]
    return min(ratios, key=lambda ratio: ratio.value, default=None)


def _in_short(ratio: Interval | None) -> str:
    if ratio is None:
        return ""
    text = f"{ratio.value:.2f}"
    return f"**{text}**" if verdict(ratio) in ("below", "above") else text


def front_table(
    found: Sequence[Point], rows: Sequence[Row], data: str, measure: str, axis: str, composed: bool = False
) -> Table:
    """For every budget, and for every policy without budgets, our best setting relative to the other methods at the
    same cost. rows: those that the costs come from. composed: compare composed policies with all single ones."""
    others = front([point for point in found if not (point.composed if composed else point.ours)], axis, measure)
    groups: dict[str, list[Point]] = {}
    for point in found:
        if point.composed if composed else point.ours:
            groups.setdefault(line_of(point), []).append(point)
    body = []
    for name in sorted(groups):
        ratios = {i: over_front(point, others, axis, measure) for i, point in enumerate(groups[name])}
        i = min(ratios, key=lambda i: ratios[i].value if ratios[i] else 0.0)
        point, ratio = groups[name][i], ratios[i]
        body.append(
            (
                name,
                way(point),
                f"{point.steps}, {point.solver}",
                number(point.cost(axis) * SCALE[axis], 2),
                number(point.exit_layer, 2),
                f"{point.measures[measure].value:.4g}",
                f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" if ratio else "",
                verdict(ratio),
            )
        )
    title, alternatives = "ours by budget", "alternatives"
    if composed:
        title, alternatives = "composed policies by budget", "single policies and alternatives"
    header = (
        f"{data}, {title}", "how", "steps", COSTS[axis], "exit layer", MEASURES[measure],
        "over the others' front", "it lies",
    )  # fmt: skip
    note = (
        f"Over the others' front: ratio to the best of all {alternatives} at the same {axis_name(axis)}, with its 95 % "
        "interval; below 1 is better. How and steps: the best setting for the budget, which is a share of the full "
        "network's multiply-adds at the same number of steps. "
    )
    return Table(where(rows), header, body, note + (warning(rows) if axis == "seconds" else ""))


def line_of(point: Point) -> str:
    """Name of the setting's line in the tables: its budget, or its method."""
    return point.setting.split(",")[0] if point.method in BY_BUDGET else point.method.removeprefix("ours, ")


def axis_name(axis: str) -> str:
    return "multiply-adds" if axis == "macs" else axis


def way(point: Point) -> str:
    """Describes one of our settings without the budget, which has its own column."""
    how, (_, *more) = point.method.removeprefix("ours, "), point.setting.split(", ")
    return ", ".join([how, *more]) if point.method in BY_BUDGET else point.setting


def best_table(timed: Sequence[Point], measured: Sequence[Row], data: str) -> Table:
    """The settings that no other setting beats in both seconds and Fréchet distance."""
    body = []
    for point in front(timed, "seconds", "frechet"):
        frechet, error = point.measures["frechet"], point.measures["error"]
        body.append(
            (
                ", ".join(filter(None, (point.method, point.setting))),
                f"{point.steps}, {point.solver}",
                number(point.seconds * 1e3, 2),
                number(point.macs / 1e6, 0),
                number(point.exit_layer, 2),
                f"{frechet.value:.3f} ({frechet.low:.3f} to {frechet.high:.3f})",
                f"{error.value:.4g}",
                number(point.psnr, 1),
                number(point.measures["accuracy"].value, 1, percent=True),
            )
        )
    header = (
        f"{data}, best for their seconds", "steps", "ms/image", "million MACs", "exit layer", "Fréchet",
        MEASURES["error"], "PSNR", "accuracy",
    )  # fmt: skip
    note = "Squared error and PSNR (dB, median): against the full network's images of the same noises at many steps. "
    return Table(where(measured), header, body, note + warning(measured))
