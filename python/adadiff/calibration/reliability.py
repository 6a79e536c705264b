"""A picture of uncertainties against errors."""

from pathlib import Path

import torch
from torch import Tensor

from ..writing import replace_file
from .recording import Recording

PANELS = 6


def matplotlib_figure() -> type:
    """matplotlib's Figure class, which needs no display. Raises ImportError, with the pip command to run, if matplotlib
    is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'adadiff_kernels[bench]'") from error
    return Figure


def reliability_picture(recording: Recording, path: Path, noised: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
    """Writes a PNG of uncertainty against error relative to the full network: a panel for each of up to 6 layers, a dot
    for each sample and timestep, coloured by timestep, and the median as a line.

    noised: t [S], u and errors [S, K, n] of noised real images (`recording.noised_errors`), for a second row of panels
    with errors to the true noise. Raises ImportError, with the pip command to run, if matplotlib is missing.
    """
    figure_kind = matplotlib_figure()
    rows = {"to the full network": (recording.t, recording.u, recording.relative)}
    if noised is not None:
        rows["to the true noise"] = noised
    K = recording.u.shape[1]
    layers = torch.linspace(0, K - 1, min(K, PANELS), dtype=torch.float32, device="cpu").round().long().tolist()
    figure = figure_kind(figsize=(2.4 * len(layers), 3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(layers), sharex=True, sharey="row", squeeze=False)
    for line, (name, (t, u, errors)) in zip(axes, rows.items(), strict=True):
        times = t[:, None].expand(-1, u.shape[-1]).flatten()
        for axis, k in zip(line, layers, strict=True):
            score, error = u[:, k].flatten(), errors[:, k].flatten().clamp(min=1e-9)
            dots = axis.scatter(score, error, c=times, s=1, alpha=0.3, vmin=0, vmax=1000, rasterized=True)
            bins = score.argsort().chunk(20)
            axis.plot([float(score[b].median()) for b in bins], [float(error[b].median()) for b in bins], "k-", lw=1)
            axis.set_yscale("log")
            axis.set_title(f"after block {k + 1}", fontsize=9)
        line[0].set_ylabel(f"squared error {name}", fontsize=9)
    figure.colorbar(dots, ax=axes, label="timestep").solids.set_alpha(1)
    figure.supxlabel("uncertainty")
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
