"""Output of commands: values, tables, errors and progress bars. Lines are wrapped and styled on a terminal only."""

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

INDENT = 2
NARROW = 40  # columns; narrower terminals are treated as this wide
MOST_CHARACTERS = 2000  # of an error message, which may quote names of any length from a file


def styled(stream: TextIO) -> bool:
    """Whether `stream` takes bold and colour: a terminal, unless NO_COLOR (no-color.org) or TERM=dumb asks for none."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if styled(sys.stdout) else text


def columns() -> int | None:
    """Width of the terminal; None in a pipe or a file, where lines stay whole for programs to read."""
    return max(NARROW, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def with_bars() -> bool:
    """Whether commands show progress bars: stderr is a terminal."""
    return sys.stderr.isatty()


def printable(text: str) -> str:
    """`text` with control characters (escape sequences, line breaks) written as escapes: text from files may hold
    any."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def print_error(kind: str, text: str) -> None:
    """One line on stderr, `adadiff: KIND: TEXT`, or `adadiff: TEXT` for an empty kind."""
    label, text = f"adadiff: {kind}: " if kind else "adadiff: ", printable(text[:MOST_CHARACTERS])
    print(f"\033[1;31m{label}\033[0m{text}" if styled(sys.stderr) else label + text, file=sys.stderr)


def show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
    """Replaces `warnings.showwarning`: one line in the style of errors, without the source line."""
    print_error("warning", " ".join(str(message).split()))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values by dotted name, as printable text."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            found[prefix + name] = ",".join(map(str, value))
        else:
            found[prefix + name] = "none" if value in (None, {}) else str(value)
    return {printable(name): printable(text) for name, text in found.items()}


def way_of_drawing(steps: object, solver: str, guidance_scale: float) -> str:
    """Such as "20 steps of ddim, guidance scale 4"; a scale of 1 (no guidance) is left out."""
    guided = "" if guidance_scale == 1 else f", guidance scale {guidance_scale:g}"
    return f"{steps} steps of {printable(solver)}{guided}"


def say(text: str) -> None:
    """Prints one line, made printable."""
    print(printable(text))


def show_lines(text: str) -> None:
    """Prints several lines, each made printable."""
    print("\n".join(map(printable, text.split("\n"))))


def show(values: Mapping[str, Any], prefix: str = "", indent: int = 0) -> None:
    """Prints a line for each value: its name and, at column `indent` or further right, the value, wrapped to the
    terminal."""
    lines = flat(values, prefix)
    indent = max(indent, *(len(name) + INDENT for name in lines))
    width = columns()
    for name, text in lines.items():
        line = f"{name:{indent}}{text}"
        if width is not None and len(line) > width:
            hanging = " " * (indent if width >= 2 * indent else 2 * INDENT)
            line = textwrap.fill(line, width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)
        print(line)


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Prints rows that share their keys, which are the header; empty columns are left out. On a terminal too narrow
    for the table, each row becomes a block of lines."""
    head = [key for key in rows[0] if any(row[key] for row in rows)]
    rows = [{printable(key): printable(text) for key, text in row.items()} for row in rows]
    head = [printable(key) for key in head]
    lines = [head, *([row[key] for key in head] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    most = columns()
    print()
    if most is not None and sum(widths) + INDENT * (len(widths) - 1) > most:
        for row in rows:
            print(bold(row[head[0]]))
            show({f"  {key}": row[key] for key in head[1:] if row[key]})
    else:
        for number, line in enumerate(lines):
            text = "  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip()
            print(text if number else bold(text))
    print()
