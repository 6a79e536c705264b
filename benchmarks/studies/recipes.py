"""Compares two recipes for training exits by the quality of their models at equal multiply-adds.

python -m benchmarks.studies.recipes ROWS OTHER_ROWS [--data digits|canvases]

ROWS and OTHER_ROWS are the rows.jsonl of two runs of `run.py --suite quality --quality-only`. Prints, in Markdown, the
front of the second model's settings with early exit, with ratios to the first model's front at equal multiply-adds;
once with a shallow model among the settings, once without.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import fronts
from benchmarks.report.cells import Table, number
from benchmarks.report.tables import markdown
from benchmarks.rows import read

EARLY = "ours, early model"  # name in the rows of the method with a shallow model


def over(points: Sequence[fronts.Point], others: Sequence[fronts.Point], early: bool) -> Table:
    """early: include settings with a shallow model, which both sides share."""
    ours, front = (
        fronts.front([p for p in found if p.ours and (early or p.method != EARLY)], "macs", "frechet")
        for found in (points, others)
    )
    body = []
    for point in ours:
        ratio = fronts.over_front(point, front, "macs", "frechet")
        setting = f"{point.method.removeprefix('ours, ')}, {point.setting}"
        body.append(
            (
                setting.removeprefix("one threshold, "),
                f"{point.steps}, {point.solver}",
                number(point.macs / 1e6, 1),
                f"{point.measures['frechet'].value:.4g}",
                f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" if ratio else "",
            )
        )
    header = ("setting", "steps", "million MACs", "Fréchet distance", "over the other front")
    title = "With an early model among the settings" if early else "Without an early model"
    return Table(title, header, body, "Over the other front: ratio at the same multiply-adds, with its 95 % interval.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, metavar="ROWS", help="of the recipe to compare with")
    parser.add_argument("other", type=Path, metavar="OTHER_ROWS", help="of the recipe in question")
    parser.add_argument("--data", choices=("digits", "canvases"), default="canvases")
    options = parser.parse_args(arguments)
    try:
        first, second = (fronts.points(read(path), options.data) for path in (options.rows, options.other))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not first or not second:
        parser.error(f"no rows of the quality suite of {options.data} there")
    for early in (True, False):
        print(markdown(over(second, first, early)) + "\n")


if __name__ == "__main__":
    main()
