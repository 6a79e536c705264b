"""All results of a run as one HTML file, without other files, network access or scripts."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from benchmarks.report.cells import Table
from benchmarks.report.tables import all_tables
from benchmarks.rows import Row

SUITES = {
    "headline": "The first picture of the README",
    "digits": "Digits: every way of sampling the trained network",
    "network": "U-ViT-S/2 with replayed exits",
    "serving": "Serving",
    "quality": "Quality at equal seconds and multiply-adds",
    "models": "Published networks",
}
# beginning of a picture's file name -> its suite and caption; the first match counts
PICTURES = {
    "images": ("digits", "Digits, the same noise and label in each column"),
    "exit-layers": ("digits", "Share of the samples that exit after each block, step by step"),
    "quality": ("digits", "Fréchet distance and images per second; bars are 95 % intervals"),
    "network": ("network", "Share of attainable, and speed-up, of each exit pattern"),
    "serving": ("serving", "Throughput of full servers, and latency of requests"),
    "equal-seconds-": ("quality", "Quality of every method, by seconds and by multiply-adds"),
    "reliability-": ("quality", "Predicted uncertainty and measured error"),
}
OTHER = "Other pictures"
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --soft: #f3f4f6; --line: #d5d8dd; --dim: #5b6169; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16181c; --soft: #21242a; --line: #3a3e46; --dim: #a0a6b0; }
}
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); } h3 { font-size: 1rem; }
pre { background: var(--soft); padding: 1rem; overflow-x: auto; font-size: 0.85rem; line-height: 1.45; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: var(--soft); }
figure { margin: 1.5rem 0; } img { max-width: 100%; background: #ffffff; padding: 0.4rem; box-sizing: border-box; }
figcaption, .note { color: var(--dim); font-size: 0.85rem; max-width: 60rem; }
"""


def page(summary: Sequence[str], rows: Sequence[Row], pictures: Sequence[Path]) -> str:
    """pictures: PNG files; each stands before the tables of its suite, pictures without a suite come last."""
    suites = list(dict.fromkeys([*SUITES, *(row["suite"] for row in rows)]))
    left = list(pictures)
    parts = []
    for suite in suites:
        own = [path for path in left if placed(path)[0] == suite]
        left = [path for path in left if path not in own]
        tables = all_tables([row for row in rows if row["suite"] == suite])
        if own or tables:
            parts += [heading(SUITES.get(suite, suite)), *map(figure, own), *map(table, tables)]
    if left:
        parts += [heading(OTHER), *map(figure, left)]
    body = "\n".join([f"<pre>{escape(chr(10).join(summary).strip())}</pre>", *parts])
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Early exit, measured</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>Early exit, measured</h1>\n{body}\n</body>\n</html>\n"
    )


def placed(picture: Path) -> tuple[str | None, str]:
    """The picture's suite, if any, and its caption."""
    found = (value for name, value in PICTURES.items() if picture.stem.startswith(name))
    return next(found, (None, picture.stem))


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = escape(f"{placed(path)[1]} ({path.name})")
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def table(made: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in made.header)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in made.body)
    return (
        f'<h3>{escape(made.title)}</h3>\n<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f'<tbody>\n{body}\n</tbody>\n</table></div>\n<p class="note">{escape(made.note)}</p>'
    )
