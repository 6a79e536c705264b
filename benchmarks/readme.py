"""Writes the tables of benchmarks/results/*.jsonl into README.md; with --check, fails unless they are there.

python benchmarks/readme.py [--check]
"""

import argparse
import sys
from pathlib import Path

from rows import ROOT, read
from tables import all_tables, markdown

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def render(results: Path = RESULTS) -> str:
    """The tables of all committed rows, oldest file first."""
    rows = [row for path in sorted(results.glob("*.jsonl")) for row in read(path)]
    return "\n".join(markdown(table) + "\n" for table in all_tables(rows))


def replace(text: str, tables: str) -> str:
    """`text` with `tables` between the two marks. Raises ValueError unless it has both, once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must hold {BEGIN} and after it {END}, once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if the tables are out of date"
    )
    check = parser.parse_args().check
    path = ROOT / "README.md"
    text = path.read_text()
    fresh = replace(text, render())
    if check and fresh != text:
        sys.exit("README.md does not show the committed rows; run python benchmarks/readme.py")
    if not check:
        path.write_text(fresh)


if __name__ == "__main__":
    main()
