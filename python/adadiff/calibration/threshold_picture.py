"""A picture of calibrated thresholds by timestep and block."""

from pathlib import Path

import numpy as np

from ..policies.calibrated import Calibration
from ..writing import replace_file
from .reliability import matplotlib_figure

COLUMNS = 4  # panels per row


def threshold_picture(calibration: Calibration, path: Path) -> None:
    """Writes a PNG with a panel for each budget: timesteps from noise (left) to image (right), blocks from the first
    (bottom) up. Darkness is the threshold: white where no sample exits, black where all do. The line shows the best
    exit layers by timestep alone, for about the same work.

    Raises ImportError, with the pip command to run, if matplotlib is missing.
    """
    figure_kind = matplotlib_figure()
    budgets, steps = calibration.budgets, len(calibration.t)
    columns = min(COLUMNS, len(budgets))
    lines = -(-len(budgets) // columns)
    figure = figure_kind(figsize=(3 * columns + 1, 2.6 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axis, budget in zip(axes.flat, budgets, strict=False):
        shown = np.array(budget.thresholds).T.clip(0, 1)  # [L - 1, S]; 2, like 1, lets every sample exit
        extent = (0.5, steps + 0.5, 0.5, calibration.num_layers - 0.5)
        image = axis.imshow(shown, origin="lower", aspect="auto", cmap="Greys", vmin=0, vmax=1, extent=extent)
        depths = budget.depths
        axis.step(
            range(1, steps + 1), depths, where="mid", color="tab:orange", linewidth=1.2, label="by timestep alone"
        )
        axis.set_title(f"exit:budget={budget.share:g}", fontsize=9)
    ticks = np.unique(np.linspace(0, steps - 1, min(5, steps)).round().astype(int))
    for axis in axes.flat:
        axis.set_xticks(ticks + 1, [f"{calibration.t[i]:.0f}" for i in ticks], fontsize=8)
    for axis in list(axes.flat)[len(budgets) :]:
        axis.axis("off")
    axes[0, 0].legend(loc="upper left", fontsize=7, framealpha=0.6)
    figure.supxlabel("timestep, from noise to image", fontsize=9)
    figure.supylabel("block", fontsize=9)
    figure.colorbar(image, ax=axes, label="exits below this uncertainty (white: none, black: all)").ax.tick_params(
        labelsize=8
    )
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
