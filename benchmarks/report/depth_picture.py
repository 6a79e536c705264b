"""Figure of the study of depth in three panels: exit layers by timestep, by class, and distance to the oracle."""

from collections.abc import Mapping

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.rows import Row

COLUMNS = 10  # of the grid of class images
CURVES = {"timestep alone": ("tab:orange", "s--"), "by sample": ("tab:blue", "o-"), "oracle": ("gray", ".:")}


def picture(rows: Mapping[str, Row], images: Tensor) -> Figure:
    """rows: "drawn" and "bounds" of the study. images [n, C, H, W]: image i is of class i, drawn as in row "drawn"."""
    drawn, curves = rows["drawn"], rows["bounds"]["curves"]
    figure = plt.figure(figsize=(13, 3.9), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1.15, 1))
    _by_timestep(axes[0], drawn)
    _by_class(axes[1], drawn, images)
    _bounds(axes[2], curves)
    return figure


def _by_timestep(axis: Axes, row: Row) -> None:
    steps = np.arange(1, len(row["by_timestep"]) + 1)
    axis.fill_between(steps, row["low"], row["high"], alpha=0.2, linewidth=0, label="8 samples of 10")
    axis.plot(steps, row["by_timestep"], "o-", markersize=3, label="mean")
    axis.set(xlabel="step (noise to image)", ylabel="blocks run", ylim=(0, row["num_layers"] + 0.5))
    axis.set_title(f"{row['timestep']:.0%} of the depth's variance lies between steps", fontsize=9)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _by_class(axis: Axes, row: Row, images: Tensor) -> None:
    """The first sample of every class, sorted and tinted by the class's mean depth."""
    means = {int(label): depth for label, depth in row["by_group"]["class"].items()}
    order = sorted(means, key=means.__getitem__)
    low, high = means[order[0]], max(means[order[-1]], means[order[0]] + 1e-9)
    palette, side = plt.get_cmap("viridis"), images.shape[-1]
    lines = -(-len(order) // COLUMNS)
    canvas = np.ones((lines * (side + 2), COLUMNS * (side + 2), 3))
    for place, label in enumerate(order):
        top, left = (place // COLUMNS) * (side + 2), (place % COLUMNS) * (side + 2)
        grey = (images[label].clamp(-1, 1).mean(0).numpy() + 1) / 2
        colour = np.array(palette((means[label] - low) / (high - low))[:3])
        canvas[top : top + side, left : left + side] = grey[..., None] * colour + (1 - grey[..., None]) * 0.08
    axis.imshow(canvas)
    axis.set_axis_off()
    share = row["groups"]["class"]
    axis.set_title(f"classes by mean depth, {low:.1f} to {high:.1f} blocks ({share:.0%} of the variance)", fontsize=9)


def _bounds(axis: Axes, curves: Mapping[str, list[tuple[float, float]]]) -> None:
    for name, (colour, style) in CURVES.items():
        work, error = zip(*curves[name], strict=True)
        axis.plot([100 * share for share in work], error, style, color=colour, markersize=4, label=name)
    axis.set(xlabel="% of the multiply-adds", ylabel="error left by exits", yscale="log")
    axis.set_title("choosing depths", fontsize=9)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
