"""Parts of a run's summary: the section of a suite, columns, sentences, and which differences are significant."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from adadiff.metrics.intervals import Interval
from benchmarks.harness import AA_TOLERANCE
from benchmarks.report.cells import Table
from benchmarks.report.tables import plain
from benchmarks.rows import Row

WIDTH = 100  # columns of a line
BETTER = {-1: "better", 0: "undecided", 1: "worse"}
FASTER = {-1: "faster", 0: "speed undecided", 1: "slower"}


@dataclass(frozen=True)
class Section:
    """A suite's part of the summary. brief: a line instead of `lines` if there is no room for them; extra: further
    lines if there is room."""

    lines: Sequence[str]
    brief: str
    extra: Sequence[str] = ()


def columns(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines of text. Columns without any content are left out."""
    kept = [i for i in range(len(header)) if i == 0 or any(line[i] for line in body)]
    table = Table("", [header[i] for i in kept], [[line[i] for i in kept] for line in body], "")
    return plain(table).strip("\n").splitlines()


def sentence(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)


def shortened(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def percent(share: float | None, digits: int = 0, sign: str = "") -> str:
    """0.6 as "60 %"; empty for None. sign: "+" to write the sign of positive numbers, too."""
    return "" if share is None else f"{share * 100:{sign}.{digits}f} %"


def with_interval(ratio: Interval | None) -> str:
    return "" if ratio is None else f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def busy(*rows: Row | None) -> str:
    """The mark of numbers from rows that are not usable; empty if all are."""
    return "busy" if any(row is not None and not row["usable"] for row in rows) else ""


def on_most_threads(rows: Sequence[Row]) -> list[Row]:
    most = max((row["threads"] for row in rows), default=0)
    return [row for row in rows if row["threads"] == most]


def order(one: Interval, other: Interval) -> int:
    """-1 if `one` is below `other`, 1 if above, 0 if the intervals overlap."""
    return -1 if one.high < other.low else int(one.low > other.high)


def order_of_seconds(one: Row, other: Row) -> int:
    """-1 if `one` takes less time than `other`, a row of the same comparison; 1 if more, 0 if undecided. A decision
    needs disjoint 20 to 80 % ranges, and speed-ups that differ by more than two measurements of the same call may."""
    over = one["speedup"] / other["speedup"] - 1
    by_round = 0 if abs(over) <= AA_TOLERANCE else -1 if over > 0 else 1
    ranges = order(*(Interval(s["median"], s["p20"], s["p80"]) for s in (one["seconds"], other["seconds"])))
    return by_round if by_round == ranges else 0


def judged_speed(one: Row, other: Row) -> str:
    return "speed unclear (busy)" if busy(one, other) else FASTER[order_of_seconds(one, other)]


def times_as_fast(row: Row) -> str:
    return f"{row['speedup']:.2f} times as fast" + f" ({busy(row)})" * (not row["usable"])


def in_cases(found: Sequence[bool], of: str = "") -> str:
    """Such as "in 2 of 3 networks". of: the noun, in the singular."""
    return f"in {sum(found)} of {len(found)} {of}{'s' * (of != '' and len(found) != 1)}".rstrip()


def grouped(rows: Iterable[Row], key: Callable[[Row], object]) -> dict[object, list[Row]]:
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
