"""Writes the tables of benchmarks/results/*.jsonl into README.md (the main ones) and into the README beside the rows.

python -m benchmarks.report.readme [--check]      with --check, nothing is written; fails unless they are there
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.report.tables import Table, all_tables, compact, markdown
from benchmarks.rows import ROOT, Row, read

RESULTS = ROOT / "benchmarks" / "results"
PAGES = {ROOT / "README.md": compact, RESULTS / "README.md": all_tables}
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def render(tables: Callable[[list[Row]], list[Table]], results: Path = RESULTS) -> str:
    """Tables of all committed rows, oldest file first."""
    rows = [row for path in sorted(results.glob("*.jsonl")) for row in read(path)]
    return "\n".join(markdown(table) + "\n" for table in tables(rows))


def replace(text: str, tables: str) -> str:
    """`text` with `tables` between the two marks. Raises ValueError unless it has both, once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the text must hold {BEGIN} and after it {END}, once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the tables are out of date")
    check = parser.parse_args().check
    for path, tables in PAGES.items():
        text = path.read_text()
        fresh = replace(text, render(tables))
        if check and fresh != text:
            sys.exit(f"{path} does not show the committed rows; run python -m benchmarks.report.readme")
        if not check:
            path.write_text(fresh)


if __name__ == "__main__":
    main()
