"""How commands print: values, tables, errors and bars. What wraps or is styled is so on a terminal only."""

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

INDENT = 2
NARROW = 40  # columns below which nothing is wrapped any more
MOST_CHARACTERS = 2000  # of an error; names in a file of others may have any number


def styled(stream: TextIO) -> bool:
    """Whether `stream` takes bold and colour: a terminal, unless NO_COLOR (no-color.org) or TERM=dumb asks for none."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if styled(sys.stdout) else text


def columns() -> int | None:
    """Width of the terminal; None in a pipe or a file, where lines stay whole for programs to read."""
    return max(NARROW, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def with_bars() -> bool:
    """Whether commands show progress bars: somebody watches."""
    return sys.stderr.isatty()


def printable(text: str) -> str:
    """Without escape sequences, line breaks and other characters that a terminal obeys instead of showing them: text
    from files may hold any."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def print_error(kind: str, text: str) -> None:
    """One line on stderr, `adadiff: KIND: TEXT`, or `adadiff: TEXT` for an empty kind."""
    label, text = f"adadiff: {kind}: " if kind else "adadiff: ", printable(text[:MOST_CHARACTERS])
    print(f"\033[1;31m{label}\033[0m{text}" if styled(sys.stderr) else label + text, file=sys.stderr)


def show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
    """In the place of `warnings.showwarning`: a line of our style, without the source."""
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
    """Such as "20 steps of ddim, guidance scale 4"; no guidance is not mentioned."""
    guided = "" if guidance_scale == 1 else f", guidance scale {guidance_scale:g}"
    return f"{steps} steps of {printable(solver)}{guided}"


def say(text: str) -> None:
    """A line, printable."""
    print(printable(text))


def show_lines(text: str) -> None:
    """Text of several lines, printable."""
    print("\n".join(map(printable, text.split("\n"))))


def show(values: Mapping[str, Any], prefix: str = "", indent: int = 0) -> None:
    """A line for each value: its name, and beside it, from column `indent` on or further, the value, wrapped to the
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
    """Rows with the same keys, which are the head; columns without content are left out. On a terminal too narrow for
    the table, each row becomes a block of lines."""
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
