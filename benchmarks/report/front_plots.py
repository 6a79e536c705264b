"""A picture for each data set, from rows alone: quality against seconds and against multiply-adds, a line for each
method, and heat maps of exit layers."""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullLocator

from adadiff.metrics.intervals import Interval
from benchmarks.report.cells import data_sets, select
from benchmarks.report.fronts import HIGHER, SCALE, SUITE, Point, front, points
from benchmarks.rows import Row

COLOURS = {
    "fewer steps": "black",
    "plain network": "tab:red",
    "shallow network": "tab:brown",
    "fixed depth": "tab:orange",
    "static table": "gold",
    "DuoDiff": "tab:green",
    "batch mean": "tab:pink",
    "reuse": "tab:olive",
    "ours, faithful": "tab:blue",
    "ours, distribution": "tab:cyan",
    "ours, estimated errors": "blue",
    "ours, early model": "mediumpurple",
    "ours, one threshold": "navy",
    "cache, whole batch": "rosybrown",
    "ours, cache": "teal",
    "static reuse": "yellowgreen",
    "ours, width": "deeppink",
    "ours, cascade": "sienna",
    "ours, cache and exits": "slateblue",
    "ours, reuse and exits": "darkturquoise",
    "ours, cache, exits, early model": "indigo",
}
COSTS = {"seconds": "ms per image, one thread", "macs": "million multiply-adds per image"}
LABELS = {
    "frechet": "Fréchet distance to real images",
    "error": "squared error to the full network",
    "accuracy": "share of images that are right",
}
MANY, SHARE = 50, 0.97  # from MANY settings on, only the best SHARE of them is shown: a few bad ones stretch the axis
SHOWN = {"ours, faithful": 3, "ours, distribution": 1, "ours, one threshold": 1, "batch mean": 1}  # heat maps of each


def pictures(rows: Sequence[Row]) -> dict[str, Figure]:
    return {f"equal-seconds-{data}.png": picture(rows, data) for data in data_sets(rows, SUITE)}


def picture(rows: Sequence[Row], data: str) -> Figure:
    found = points(rows, data)
    timed = [point for point in found if point.seconds is not None]
    axes_of = {"seconds": timed, "macs": found} if timed else {"macs": found}
    maps = exit_maps(rows, data)
    lines = len(axes_of)
    figure = plt.figure(figsize=(14, 4.2 * lines + (3 if maps else 0)), layout="constrained")
    above, *below = np.atleast_1d(
        figure.subfigures(2 if maps else 1, 1, height_ratios=[4.2 * lines, 3] if maps else None)
    )
    axes = above.subplots(lines, len(LABELS), squeeze=False)
    for line, (axis, own) in zip(axes, axes_of.items(), strict=True):
        for panel, measure in zip(line, LABELS, strict=True):
            _curves(panel, own, axis, measure)
    handles: dict[str, object] = {}
    for panel in axes.flat:
        handles |= dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    above.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=9)
    busy = any(not r["usable"] for r in select(rows, SUITE, "speed") if r["parameters"]["data"] == data)
    above.suptitle(f"{data}: bars are 95 % intervals" + (" (!) timed on a busy machine" if busy else ""), fontsize=11)
    for part in below:
        _heat(part, maps)
    return figure


def _curves(panel: Axes, found: Sequence[Point], axis: str, measure: str) -> None:
    scale = SCALE[axis]
    others = front([point for point in found if not point.ours], axis, measure)
    panel.plot(
        [p.cost(axis) * scale for p in others],
        [p.measures[measure].value for p in others],
        color="lightgray",
        linewidth=7,
        solid_capstyle="round",
        zorder=0,
        label="front of all alternatives",
    )
    for method in sorted({p.method for p in found}, key=list(COLOURS).index):
        own = [point for point in found if point.method == method]
        best, colour = front(own, axis, measure), COLOURS[method]
        panel.plot(
            [p.cost(axis) * scale for p in own], [p.measures[measure].value for p in own], ".", color=colour, alpha=0.2
        )
        ours = method.startswith("ours")
        panel.errorbar(
            [p.cost(axis) * scale for p in best],
            [p.measures[measure].value for p in best],
            bars([p.measures[measure] for p in best]),
            fmt="o-" if ours else "s--",
            markersize=4 if ours else 3,
            linewidth=1.8 if ours else 1,
            capsize=2,
            elinewidth=0.8,
            color=colour,
            label=method,
        )
    panel.set(xlabel=COSTS[axis], ylabel=LABELS[measure], xscale="log")
    if measure not in HIGHER:
        panel.set_yscale("log")
    if len(found) >= MANY:
        higher = measure in HIGHER
        values = [p.measures[measure].value for p in found]
        worst = np.quantile(values, 1 - SHARE if higher else SHARE)
        shown = [p.measures[measure] for p in found if (p.measures[measure].value >= worst) == higher]
        panel.set_ylim(min(i.low for i in shown) / 1.03, max(i.high for i in shown) * 1.03)
    for scaled in (panel.xaxis, panel.yaxis) if measure not in HIGHER else (panel.xaxis,):
        tick_in_full(scaled)
    panel.grid(alpha=0.3)


def tick_in_full(scaled: Axis) -> None:
    """Marks a logarithmic axis at 1, 2, 3, 5, 7 and their multiples by ten, written out."""
    scaled.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    scaled.set_major_formatter("{x:g}")
    scaled.set_minor_locator(NullLocator())


def bars(intervals: Sequence[Interval]) -> np.ndarray:
    """Error bars [2, n]. Bootstrap intervals are not centred; by rounding, an estimate may lie just outside its own."""
    return np.array([[max(0, i.value - i.low) for i in intervals], [max(0, i.high - i.value) for i in intervals]])


def exit_maps(rows: Sequence[Row], data: str) -> list[Row]:
    """Rows of the last checkpoints, the most steps and the first solver: SHOWN settings of each method."""
    own = [r for r in select(rows, SUITE, "quality") if r["parameters"]["data"] == data and "exit_histogram" in r]
    if not own:
        return []
    last = own[-1]["parameters"]["checkpoints"]
    own = [r for r in own if r["parameters"]["checkpoints"] == last]
    most = max(r["parameters"]["steps"] for r in own)
    solver = own[0]["parameters"]["solver"]
    own = [r for r in own if (r["parameters"]["steps"], r["parameters"]["solver"]) == (most, solver)]
    chosen: list[Row] = []
    for method, number in SHOWN.items():
        mine = [row for row in own if row["variant"] == method]
        places = np.linspace(0, len(mine) - 1, number) if number > 1 else [(len(mine) - 1) // 2]
        chosen += [mine[i] for i in sorted({round(float(p)) for p in places})] if mine else []
    return chosen


def _heat(figure: SubFigure, rows: Sequence[Row]) -> None:
    """Heat maps: share of the samples that exit after each block, by timestep."""
    axes = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
    for axis, row in zip(axes, rows, strict=True):
        histogram = np.array(row["exit_histogram"], dtype=float)  # [steps, layers]
        share = histogram / histogram.sum(1, keepdims=True)
        steps, layers = share.shape
        map_ = axis.imshow(
            share.T, origin="lower", aspect="auto", vmin=0, vmax=1, extent=(0.5, steps + 0.5, 0.5, layers + 0.5)
        )
        axis.plot(np.arange(1, steps + 1), share @ np.arange(1, layers + 1), color="white", linewidth=1.2)
        ticks = np.linspace(0, steps - 1, min(5, steps)).round().astype(int)
        axis.set_xticks(ticks + 1, [f"{row['times'][i]:.0f}" for i in ticks], fontsize=8)
        axis.set_title(f"{row['variant']}\n{row['parameters']['setting']}", fontsize=9)
        axis.set_xlabel("timestep", fontsize=9)
    axes[0].set_ylabel(f"exit layer, {steps} steps")
    figure.colorbar(map_, ax=list(axes), label="share of samples")
