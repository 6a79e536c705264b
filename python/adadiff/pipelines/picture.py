"""A record as a picture: the share of the network that each lane ran at each step."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..calibration.reliability import matplotlib_figure
from ..writing import replace_file

if TYPE_CHECKING:
    from .record import ReuseRecord, StepRecord

MOST_LANES = 64  # lanes per panel


def save_picture(record: "ReuseRecord", path: str | Path) -> None:
    """Writes a PNG of the latest run: one panel for each guidance half (or call of a step), one row per lane, one
    column per step; darker means more blocks ran. Panels show the first MOST_LANES lanes.

    Raises ValueError if there was no call, ImportError without matplotlib.
    """
    figure_kind = matplotlib_figure()
    panels: dict[tuple[str, int, int], list[StepRecord]] = {}
    for step in record.steps:
        panels.setdefault((step.context, step.call, len(step.full)), []).append(step)
    if not panels:
        raise ValueError(f"{record.name} has not been called since it was enabled; draw something first")
    heights = [min(lanes, MOST_LANES) for _, _, lanes in panels]
    longest = max(map(len, panels.values()))
    size = (min(16.0, 2.5 + 0.22 * longest), sum(1.1 + 0.2 * lanes for lanes in heights) + 0.5)
    figure = figure_kind(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    for axis, ((context, call, lanes), steps) in zip(axes, panels.items(), strict=True):
        ran = torch.stack([step.blocks for step in steps]).T[:MOST_LANES] / record.num_blocks
        shown = axis.imshow(ran.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_xticks(range(len(steps)), minor=True)
        axis.set_yticks(range(len(ran)), [str(lane) for lane in range(len(ran))], fontsize=7)
        axis.set_ylabel("lane")
        title = context or (f"call {call + 1} of a step" if len(panels) > 1 else "all calls")
        axis.set_title(f"{title}: {float(ran.mean()):.0%} of the blocks" + " (first lanes)" * (lanes > MOST_LANES))
    axes[-1].set_xlabel("step")
    figure.colorbar(shown, ax=list(axes), label=f"share of the {record.num_blocks} blocks that ran")
    figure.suptitle(f"{record.name}: {record.policy}", fontsize=9)
    replace_file(Path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=120))
