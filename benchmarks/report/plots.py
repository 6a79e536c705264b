"""Pictures from rows; the grid of images also needs the samples that the quality run stored."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file

from benchmarks.baselines.servers import AGREE, LOCK_STEP, MEAN, OURS, PLAIN, STATIC
from benchmarks.report import front_plots, head_to_head_tables
from benchmarks.report.cells import name_of
from benchmarks.report.tables import latest, qualities, select, title
from benchmarks.rows import Row

METHODS = {
    "early exit": "tab:blue",
    "fixed depth": "tab:orange",
    "fewer steps": "tab:green",
    "plain, equal budget": "tab:red",
}
POLICIES = {
    LOCK_STEP: "gray",
    PLAIN: "black",
    MEAN: "tab:green",
    AGREE: "tab:red",
    STATIC: "tab:orange",
    OURS: "tab:blue",
}
CURVES = ("digits", "imagenet256_uvit_large")  # models whose latencies are plotted
COLUMNS = 10  # of the grid of images: one digit of each class


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes every picture for which there are rows as a PNG file to `folder`, and returns the paths."""
    rows = latest(rows)
    pictures = {
        "images.png": images(folder / "cache"),
        "exit-layers.png": exit_layers(rows),
        "quality.png": quality(rows),
        "network.png": network(rows),
        "serving.png": serving(rows),
        **front_plots.pictures(rows),
        **head_to_head_tables.pictures(rows),
    }
    written = []
    for name, figure in pictures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=150, bbox_inches="tight")
            plt.close(figure)
            written.append(folder / name)
    return written


def images(cache: Path) -> Figure | None:
    """Rows of digits in pairs: the full network above, early exit from the same noise below."""
    prefix = "early-exit-"
    kept = {path.stem.removeprefix(prefix): load_file(path) for path in cache.glob(f"{prefix}*.safetensors")}
    if not kept:
        return None
    depths = {setting: float(tensors["exit_layer"].float().mean()) for setting, tensors in kept.items()}
    strips = [("full", next(iter(kept.values()))["full"][:COLUMNS])]
    for setting in sorted(depths, key=depths.__getitem__, reverse=True):
        strips.append((f"θ = {setting}\n{depths[setting]:.1f} blocks", kept[setting]["early"][:COLUMNS]))
    figure, axes = plt.subplots(len(strips), 1, figsize=(7, 0.85 * len(strips)), squeeze=False)
    for axis, (name, strip) in zip(axes[:, 0], strips, strict=True):
        padded = np.pad(strip[:, 0].numpy(), ((0, 0), (0, 0), (0, 1)), constant_values=1)  # [n, 8, 9]
        axis.imshow(np.concatenate(list(padded), axis=1), cmap="gray", vmin=-1, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0, 0].set_title("Same noise and label in each column", fontsize=9)
    return figure


def exit_layers(rows: Sequence[Row]) -> Figure | None:
    """Heat maps, one for each threshold: share of the samples that exit after each block, step by step."""
    measured = {
        title(row): np.array(row["exit_histogram"])
        for row in select(rows, "digits", "quality")
        if row["variant"] == "early exit" and row["parameters"]["run"] == 0
    }
    if not measured:
        return None
    figure, axes = plt.subplots(1, len(measured), figsize=(3.2 * len(measured), 3), squeeze=False, sharey=True)
    for axis, (name, histogram) in zip(axes[0], measured.items(), strict=True):
        steps, layers = histogram.shape
        share = histogram / histogram.sum(axis=1, keepdims=True)
        map_ = axis.imshow(
            share.T,
            origin="lower",
            aspect="auto",
            vmin=0,
            vmax=1,
            extent=(0.5, steps + 0.5, 0.5, layers + 0.5),
        )
        mean = share @ np.arange(1, layers + 1)
        axis.plot(np.arange(1, steps + 1), mean, color="white", linewidth=1.2, label="mean")
        axis.set_title(name.removeprefix("early exit, "), fontsize=10)
        axis.set_xlabel("step (noise to image)")
    axes[0, 0].set_ylabel("exit layer")
    axes[0, 0].legend(loc="lower left", fontsize=7, framealpha=0.4)
    figure.colorbar(map_, ax=axes[0].tolist(), label="share of samples")
    return figure


def quality(rows: Sequence[Row]) -> Figure | None:
    """Fréchet distance against images per second; bars are 95 % intervals."""
    speed = {title(row): row for row in select(rows, "digits", "speed")}
    good = {name: value for name, value in qualities(rows).items() if name in speed}
    if not good:
        return None
    figure, axis = plt.subplots(figsize=(6, 4))
    by_method: dict[str, list[str]] = {}
    for name in good:
        by_method.setdefault(speed[name]["variant"], []).append(name)
    for method, names in by_method.items():
        names.sort(key=lambda name: speed[name]["images_per_second"])
        x = [speed[name]["images_per_second"] for name in names]
        y = np.array([good[name].frechet for name in names])
        ends = np.array([[good[name].low for name in names], [good[name].high for name in names]])
        # bootstrap intervals are not centred; rounding may put an estimate just outside its interval
        bars = np.maximum(np.abs(ends - y), 0)
        axis.errorbar(x, y, bars, fmt="o-", capsize=3, color=METHODS.get(method, "black"), label=method)
    axis.set(xlabel="images per second", ylabel="Fréchet distance to held-out digits (lower is better)")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def network(rows: Sequence[Row]) -> Figure | None:
    """Share of attainable and speed-up of each exit pattern, one panel for each comparison."""
    groups: dict[str, list[Row]] = {}
    for row in select(rows, "network", "pattern"):
        name = f"batch {row['parameters']['batch']}, {row['dtype']}, {row['threads']} thread(s)"
        groups.setdefault(name, []).append(row)
    if not groups:
        return None
    figure, axes = plt.subplots(
        2, len(groups), figsize=(3.6 * len(groups), 5), squeeze=False, sharey="row", sharex="col"
    )
    for column, (name, group) in zip(axes.T, groups.items(), strict=True):
        labels = [row["variant"] + ("" if row["usable"] else " (!)") for row in group]
        column[0].bar(labels, [row["share_of_attainable"] for row in group], color="tab:blue")
        column[1].bar(labels, [row["speedup"] for row in group], color="tab:orange")
        column[1].plot(
            labels,
            [row["macs_full"] / row["macs"] for row in group],
            "k_",
            markersize=14,
            label="by multiply-adds",
        )
        column[0].set_title(name, fontsize=9)
        plt.setp(column[1].get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        for axis in column:
            axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes[0, 0].set_ylabel("share of attainable")
    axes[1, 0].set_ylabel("speed-up over the fastest plain")
    axes[1, 0].legend(fontsize=7)
    return figure


def serving(rows: Sequence[Row]) -> Figure | None:
    """Images a second of saturated servers, and latency against load: p50 solid, p95 dashed."""
    throughput = select(rows, "serving", "throughput")
    most = max((row["parameters"]["capacity"] for row in throughput), default=0)
    throughput = [row for row in throughput if row["parameters"]["capacity"] == most]
    latency = [row for row in select(rows, "serving", "latency") if row["parameters"]["load"] != "burst"]
    models = [name for name in CURVES if any(row["parameters"]["model"] == name for row in latency)]
    if not throughput and not models:
        return None
    panels = bool(throughput) + len(models)
    figure, axes = plt.subplots(1, panels, figsize=(4.2 * panels, 3.6), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0, bool(throughput) :], models, strict=True):
        _curves(axis, [row for row in latency if row["parameters"]["model"] == model])
        axis.set(xlabel="load, of what lock-step batches bear", ylabel="latency (s)", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.set_title(f"{name_of(model)}, p50 and p95 (dashed)", fontsize=9)
    if models:
        figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    if throughput:
        names = [row["variant"] + ("" if row["usable"] else " (!)") for row in throughput][::-1]
        values = [row["images_per_second"] for row in throughput][::-1]
        colours = [POLICIES.get(row["variant"], "lightgray") for row in throughput][::-1]
        axes[0, 0].bar_label(axes[0, 0].barh(names, values, color=colours), fmt="%.2f", fontsize=7, padding=2)
        axes[0, 0].margins(x=0.15)
        axes[0, 0].tick_params(axis="y", labelsize=8)
        axes[0, 0].set_xlabel("images per second")
        axes[0, 0].set_title("U-ViT-S/2, mixed timesteps", fontsize=9)
    return figure


def _curves(axis: Axes, rows: Sequence[Row]) -> None:
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["parameters"]["load"])
        load = [row["parameters"]["load"] for row in own]
        colour = POLICIES.get(name, "lightgray")
        axis.plot(load, [row["seconds"]["median"] for row in own], "o-", color=colour, markersize=3, label=name)
        axis.plot(load, [row["p95"] for row in own], "o--", color=colour, markersize=3)
