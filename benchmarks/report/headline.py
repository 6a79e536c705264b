"""The picture at the top of the README: samples of the full network, of reuse and of early exit from the same noises,
below each the blocks of every step, and beside them error against cost, ours and the front of all others. Numbers come
from rows, images from the model of the package."""

import hashlib
import json
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from adadiff.policies.estimated_file import read_estimates
from benchmarks.report import fronts
from benchmarks.report.cells import select
from benchmarks.rows import Row
from benchmarks.suites.drawing import fingerprint, load
from benchmarks.suites.headline import ADAPTIVE, EARLY, ESTIMATES, FULL, MODEL, REUSE, SAMPLES, STEPS, SUITE, drawn

SHOWN = 12  # the first samples, not selected
DATA, MEASURE = "letters", "error"  # of the fronts
LEAST = 0.3  # of the most multiply-adds; settings with fewer are far from the full network's images


def source(rows: Sequence[Row]) -> str:
    """Hash of all that the picture shows: its rows, the model and the estimates of reuse."""
    both = [row for kind in ("quality", "speed") for row in select(rows, fronts.SUITE, kind)]
    compared = [row for row in both if row["parameters"]["data"] == DATA]
    known = read_estimates(ESTIMATES).digest
    found = json.dumps([*select(rows, SUITE, "speed"), *compared, SHOWN, fingerprint(MODEL), known], sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def picture(rows: Sequence[Row]) -> Figure:
    """Raises ValueError if a row is missing."""
    timed = {row["variant"]: row for row in select(rows, SUITE, "speed")}
    if not {method.name for method in (FULL, *ADAPTIVE)} <= set(timed):
        raise ValueError("the picture needs the rows of `python benchmarks/run.py --suite headline`")
    full, L = timed[FULL.name], load(MODEL).num_layers
    whole = plt.figure(figsize=(13, 4.9), layout="constrained")
    figure, compared = whole, fronts.points(rows, DATA)
    if compared:
        figure, beside = whole.subfigures(1, 2, width_ratios=(2.6, 1))
        _fronts(beside.subplots(), compared)
    axes = figure.subplots(5, SHOWN, height_ratios=(1, 1, 0.8, 1, 0.8), gridspec_kw={"wspace": 0.06, "hspace": 0.04})
    palette = plt.get_cmap("viridis")
    plain, _ = drawn(FULL)
    for i in range(SHOWN):
        _image(axes[0, i], plain[i], palette(1.0))
    axes[0, 0].set_ylabel(FULL.name, fontsize=9)
    for row, method in ((1, REUSE), (3, EARLY)):
        images, report = drawn(method)
        blocks = report.exit_layer[:, :SHOWN].float().mean(-1).numpy()  # [steps, n], means of both halves of guidance
        for i in range(SHOWN):
            _image(axes[row, i], images[i], palette(blocks[:, i].mean() / L))
            _steps(axes[row + 1, i], blocks[:, i], L, palette)
        axes[row, 0].set_ylabel(method.name, fontsize=9)
        axes[row + 1, 0].set_ylabel("blocks run\nat each step", fontsize=8)
        axes[row + 1, 0].set_yticks([1, L], ["1", str(L)], fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("noise → image", fontsize=6)
    said = [
        f"{row['variant']}, {row['macs_share']:.0%} of the work, in {row['seconds']['median']:.2f} s"
        for row in (timed[REUSE.name], timed[EARLY.name])
    ]
    all_blocks = f"all {L} blocks in {full['seconds']['median']:.2f} s"
    figure.suptitle(f"{SAMPLES} images of {STEPS} steps:  {all_blocks};  {';  '.join(said)}", fontsize=11)
    bar = figure.colorbar(plt.cm.ScalarMappable(plt.Normalize(0, L), palette), ax=axes, pad=0.01, aspect=30)
    bar.set_label("blocks run (frame: mean)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return whole


def _fronts(axis: Axes, found: Sequence[fronts.Point]) -> None:
    """Error against seconds, or multiply-adds if none were timed: all settings, the best of ours and of others."""
    timed = [point for point in found if point.seconds is not None]
    cost, shown = ("seconds", timed) if timed else ("macs", found)
    most = max(point.cost(cost) for point in shown if point.method == "fewer steps")
    shown = [point for point in shown if LEAST * most <= point.cost(cost) <= most]
    for name, colour, own in (
        ("all others", "dimgray", [point for point in shown if not point.ours]),
        ("by sample", "tab:blue", [point for point in shown if point.ours]),
    ):
        at = [(point.cost(cost) * fronts.SCALE[cost], 1e3 * point.measures[MEASURE].value) for point in own]
        axis.scatter(*zip(*at, strict=True), s=8, color=colour, alpha=0.35, linewidth=0)
        best = fronts.front(own, cost, MEASURE)
        at = [(point.cost(cost) * fronts.SCALE[cost], 1e3 * point.measures[MEASURE].value) for point in best]
        axis.plot(*zip(*at, strict=True), "o-", color=colour, markersize=3, label=name)
    axis.set(yscale="log", xlabel="ms an image" if timed else "million multiply-adds an image")
    axis.set_ylabel("squared error x 1000", fontsize=8)
    axis.set_title("difference from the full network's images", fontsize=9)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def printed(rows: Sequence[Row]) -> str:
    """The output of `print(report)` in the README's example, with the seconds of the rows, uncompiled as there."""
    row = next(row for row in select(rows, SUITE, "speed") if row["variant"] == EARLY.name)
    n, seconds, depth, L = SAMPLES, row["ways"]["engine"], row["mean_exit_layer"], load(MODEL).num_layers
    return (
        f"{n} samples in {seconds:.2f} s ({n / seconds:.1f}/s); {depth:.2f} of {L} blocks a step "
        f"({depth / L:.1%}), {row['macs_share']:.1%} of the multiply-adds of the full network"
    )


def _image(axis: Axes, image: Tensor, colour: tuple[float, ...]) -> None:
    axis.imshow(image[0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=3)


def _steps(axis: Axes, layers: np.ndarray, num_layers: int, palette: matplotlib.colors.Colormap) -> None:
    axis.bar(range(len(layers)), layers, width=1.0, color=palette(layers / num_layers))
    axis.set(xticks=[], yticks=[], ylim=(0, num_layers), xlim=(-0.5, len(layers) - 0.5))
