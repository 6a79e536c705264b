"""Publishes the committed rows (benchmarks/results/*.jsonl): writes the tables of the README and of the pages in that
folder, and the pictures made from rows.

python -m benchmarks.report.publish [--check]      with --check, writes nothing and fails unless all is current

Rows of a comparison on a busy machine (`usable` false) are left out.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from adadiff.writing import replace_file
from benchmarks.gpu import tables as gpu_tables
from benchmarks.report import (
    admission_tables,
    equal_seconds_table,
    front_plots,
    fronts,
    head_to_head_tables,
    headline,
    http_tables,
    pipelines_tables,
    plots,
    serving_tables,
)
from benchmarks.report.cells import Table, select
from benchmarks.report.model_tables import models, policies
from benchmarks.report.tables import digits, latest, markdown, network, overhead
from benchmarks.rows import ROOT, Row, read

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
VALUE = re.compile(r"(<!--value:([\w-]+)-->)(.*?)(<!--end-->)", re.DOTALL)  # by its name in VALUES
SOURCE = "Source"  # key of the PNG text with a hash of the rows and models that a picture was made of
Tables = Callable[[Sequence[Row]], list[Table]]


def claim(rows: Sequence[Row]) -> Row:
    """The row of the README's claim: U-ViT-S/2 at batch 64, lanes exiting after blocks 3 to 13."""
    patterns = (row for row in select(rows, "network", "pattern") if row["variant"] == "spread")
    return next(r for r in patterns if (r["parameters"]["batch"], r["dtype"], r["threads"]) == (64, "float32", 2))


VALUES: dict[str, Callable[[Sequence[Row]], str]] = {
    "speed-up": lambda rows: f"{claim(rows)['speedup']:.1f}",
    "attainable": lambda rows: f"{claim(rows)['share_of_attainable']:.0%}",
    "depth": lambda rows: f"{claim(rows)['mean_exit_layer']:g}",
    "output": lambda rows: f"\n```text\n{headline.printed(rows)}\n```\n",
}
PAGES: dict[Path, tuple[Tables, ...]] = {
    ROOT / "README.md": (equal_seconds_table.tables,),
    RESULTS / "equal-seconds.md": (fronts.tables,),
    RESULTS / "digits.md": (digits, overhead),
    RESULTS / "network.md": (network, policies, models),
    RESULTS / "serving.md": (*serving_tables.ALL, admission_tables.tables),
    RESULTS / "http.md": http_tables.ALL,
    RESULTS / "diffusers.md": (pipelines_tables.tables,),
    RESULTS / "head-to-head.md": (head_to_head_tables.tables,),
    RESULTS / "gpu.md": (*gpu_tables.ALL, gpu_tables.network_side_by_side),
}


def rows_digest(rows: Sequence[Row], suites: set[str]) -> str:
    own = [row for row in rows if row["suite"] in suites]
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


# name -> (hash of its sources, how it is drawn)
PICTURES: dict[str, tuple[Callable[[Sequence[Row]], str], Callable[[Sequence[Row]], Figure | None]]] = {
    "headline.png": (headline.source, headline.picture),
    **{
        f"equal-seconds-{data}.png": (
            partial(rows_digest, suites={fronts.SUITE}),
            partial(front_plots.picture, data=data),
        )
        for data in ("letters", "canvases", "digits")
    },
    "head-to-head-canvases.png": (
        partial(rows_digest, suites={head_to_head_tables.SUITE}),
        partial(head_to_head_tables.picture, data="canvases"),
    ),
    "exit-layers.png": (partial(rows_digest, suites={"digits"}), plots.exit_layers),
    "serving.png": (partial(rows_digest, suites={serving_tables.SUITE}), plots.serving),
}


def publishable(rows: Sequence[Row]) -> list[Row]:
    """The last row of everything measured, without rows of busy machines."""
    return [row for row in latest(rows) if row.get("usable", True)]


def committed() -> list[Row]:
    """The publishable rows of all files, sorted by name; if two files have rows of the same thing, the later counts."""
    return publishable([row for path in sorted(RESULTS.glob("*.jsonl")) for row in read(path)])


def render(makers: Sequence[Tables], rows: Sequence[Row]) -> str:
    return "\n".join(markdown(table) + "\n" for make in makers for table in make(rows) if table.body)


def replace(text: str, tables: str) -> str:
    """`text` with `tables` between the two marks. Raises ValueError unless both occur exactly once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the text must hold {BEGIN} and after it {END}, once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}{END}{rest.split(END)[1]}"


def shown(page: Path, rows: Sequence[Row]) -> str:
    """The page's text with current tables and values."""
    text = replace(page.read_text(), render(PAGES[page], rows))
    return VALUE.sub(lambda found: f"{found[1]}{VALUES[found[2]](rows)}{found[4]}", text)


def source_of(picture: Path) -> str | None:
    """Hash of the sources of a written picture; None if the file or the hash is missing."""
    if not picture.exists():
        return None
    with Image.open(picture) as opened:
        return opened.info.get(SOURCE)


def outdated(rows: Sequence[Row]) -> list[Path]:
    """Pages and pictures that do not show these rows."""
    pages = [page for page in PAGES if shown(page, rows) != page.read_text()]
    return pages + [
        RESULTS / name for name, (made_of, _) in PICTURES.items() if source_of(RESULTS / name) != made_of(rows)
    ]


def write(path: Path, rows: Sequence[Row]) -> None:
    if path in PAGES:
        text = shown(path, rows)
        replace_file(path, lambda temporary: temporary.write_text(text))
        return
    made_of, draw = PICTURES[path.name]
    figure = draw(rows)
    if figure is None:
        raise ValueError(f"no rows for {path.name}")
    metadata = {SOURCE: made_of(rows)}
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120, metadata=metadata))
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if anything is out of date")
    check, rows = parser.parse_args().check, committed()
    for path in outdated(rows):
        if check:
            sys.exit(
                f"{path.relative_to(ROOT)} does not show the committed rows; run python -m benchmarks.report.publish"
            )
        write(path, rows)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
