"""Our policies beside other packages and published methods: a table and a picture, from rows alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adadiff.metrics.intervals import Interval
from benchmarks.report.cells import Table, data_sets, mark, number, select, warning, where
from benchmarks.report.front_plots import bars, tick_in_full
from benchmarks.rows import Row

SUITE = "head-to-head"
OURS = "ours"
NOTE = (
    "Drawn with the same trained network, the same noises and {steps} steps, fewer where it says so. ms: an image, "
    "drawn in batches of 1 and of 8, on one thread; of full: over the full network in the same rounds (median). "
    "Squared error: to the full network with many steps, {samples} samples in batches of 8, with 95 % interval. "
    "Changed: the share of {alone} samples that differ visibly when they are drawn alone. "
)


@dataclass(frozen=True)
class Found:
    """A method at one setting. timed: by batch size."""

    quality: Row
    timed: dict[int, Row]

    @property
    def name(self) -> str:
        return self.quality["variant"]

    @property
    def setting(self) -> str:
        return self.quality["parameters"]["setting"]


def found(rows: Sequence[Row], data: str) -> list[Found]:
    """In the order in which they were measured; those without any seconds, too."""
    own = [row for row in rows if row["suite"] == SUITE and row["parameters"]["data"] == data]
    timed: dict[tuple[str, str], dict[int, Row]] = {}
    for row in select(own, SUITE, "speed"):
        given = row["parameters"]
        timed.setdefault((row["variant"], given["setting"]), {})[given["batch"]] = row
    return [
        Found(row, timed.get((row["variant"], row["parameters"]["setting"]), {}))
        for row in select(own, SUITE, "quality")
    ]


def tables(rows: Sequence[Row]) -> list[Table]:
    return [_table(found(rows, data), data) for data in data_sets(rows, SUITE)]


def _table(methods: Sequence[Found], data: str) -> Table:
    batches = sorted({batch for one in methods for batch in one.timed})
    header = [f"{data}, method", "setting", "decided for"]
    for batch in batches:
        header += [f"ms, batch {batch}", "of full"]
    header += ["squared error", "Fréchet", "changed"]
    body = []
    for one in methods:
        cells = [one.name, one.setting, one.quality["decides"]]
        for batch in batches:
            row = one.timed.get(batch)
            cells += ["", ""] if row is None else [_ms(row), number(row["of_full"], 2)]
        own, error = one.quality, _error(one.quality)
        shown = f"{error.value:.4f} ({error.low:.4f} to {error.high:.4f})"
        body.append((*cells, shown, number(own["frechet"], 2), number(own["changed"], 0, percent=True)))
    timed = [row for one in methods for row in one.timed.values()]
    given = methods[0].quality
    sizes = {"steps": given["parameters"]["steps"], "samples": given["parameters"]["samples"], "alone": given["alone"]}
    versions = ", ".join(f"{name} {version}" for name, version in given["packages"].items())
    return Table(f"{where(timed or [given])}, {versions}", header, body, NOTE.format(**sizes) + warning(timed))


def _error(quality: Row) -> Interval:
    return Interval(quality["error"], quality["error_low"], quality["error_high"])


def _ms(row: Row) -> str:
    return f"{row['seconds_per_image'] * 1e3:.2f}" + mark(row)


def pictures(rows: Sequence[Row]) -> dict[str, Figure | None]:
    return {f"head-to-head-{data}.png": picture(rows, data) for data in data_sets(rows, SUITE)}


def picture(rows: Sequence[Row], data: str) -> Figure | None:
    """Squared error against seconds: a panel for each batch size, a line for each method."""
    methods = found(rows, data)
    batches = sorted({batch for one in methods for batch in one.timed})
    if not batches:
        return None
    figure, axes = plt.subplots(1, len(batches), figsize=(6.5 * len(batches), 5.2), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(one.name for one in methods))
    colours = dict(zip(names, plt.colormaps["tab20"].colors, strict=False))
    for panel, batch in zip(axes[0], batches, strict=True):
        for name in names:
            own = [one for one in methods if one.name == name and batch in one.timed]
            if own:
                _curve(panel, own, batch, colours[name])
        panel.set(xscale="log", yscale="log", title=f"batch {batch}", xlabel="ms per image, one thread")
        tick_in_full(panel.xaxis)
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("squared error to the full network with many steps")
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _curve(panel: Axes, methods: Sequence[Found], batch: int, colour: str) -> None:
    """A method's settings as points, and a line through those that no faster one of them beats."""
    points = sorted(
        ((one.timed[batch]["seconds_per_image"] * 1e3, _error(one.quality)) for one in methods),
        key=lambda point: point[0],
    )
    best: list[tuple[float, Interval]] = []
    for ms, error in points:
        if not best or error.value < best[-1][1].value:
            best.append((ms, error))
    panel.plot([ms for ms, _ in points], [error.value for _, error in points], ".", color=colour, alpha=0.4)
    ours = methods[0].name.startswith(OURS)
    panel.errorbar(
        [ms for ms, _ in best],
        [error.value for _, error in best],
        bars([error for _, error in best]),
        fmt="o-" if ours else "s--",
        markersize=5 if ours else 3.5,
        linewidth=2 if ours else 1,
        capsize=2,
        elinewidth=0.8,
        color=colour,
        label=methods[0].name,
    )
