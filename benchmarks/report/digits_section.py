"""The trained digits in the summary: early exit compared with fewer steps and fixed depth in speed and quality."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adadiff.metrics.intervals import Interval
from benchmarks.report.cells import number, select
from benchmarks.report.sections import (
    BETTER,
    Section,
    busy,
    columns,
    judged_speed,
    on_most_threads,
    order,
    percent,
    sentence,
    times_as_fast,
    with_interval,
)
from benchmarks.report.tables import Quality, qualities, title
from benchmarks.rows import Row

SUITE = "digits"
HEADER = ("Digits, trained network", "images/s", "speed-up", "", "blocks run", "Fréchet distance, full = 1")
FULL = Interval(1.0, 1.0, 1.0)  # ratio of the full network's distance to itself


@dataclass(frozen=True)
class Method:
    """A way of drawing digits. steps: its own, and those of the full network."""

    name: str
    speed: Row | None
    drawn: Row | None
    quality: Quality | None
    steps: tuple[int, int]

    @property
    def blocks(self) -> float | None:
        """Blocks of an image as a share of the full network's."""
        share = 1.0
        if self.speed and "blocks" in self.speed:
            share = self.speed["blocks"] / self.speed["blocks_full"]
        elif self.quality:
            share = self.quality.mean["blocks_share"]
        return share * self.steps[0] / self.steps[1]

    @property
    def over_full(self) -> Interval | None:
        return self.quality and self.quality.over_full

    def cells(self) -> tuple[str, ...]:
        speed = self.speed or {}
        return (
            self.name,
            number(speed.get("images_per_second"), 1),
            number(speed.get("speedup"), 2),
            busy(self.speed),
            percent(self.blocks),
            with_interval(self.over_full),
        )


@dataclass(frozen=True)
class Digits:
    """Rows and qualities by title."""

    speed: Mapping[str, Row]
    drawn: Mapping[str, Row]
    qualities: Mapping[str, Quality]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Digits":
        speed = {title(row): row for row in on_most_threads(select(rows, SUITE, "speed"))}
        good = qualities(rows)
        drawn = {title(row): row for row in select(rows, SUITE, "quality") if title(row) in good}
        return cls(speed, drawn, good)

    @property
    def rows(self) -> dict[str, Row]:
        return {**self.drawn, **self.speed}

    def method(self, name: str, of: str) -> Method | None:
        """The method of that title, called `name`; None if no row has the title."""
        speed, drawn = self.speed.get(of), self.drawn.get(of)
        if speed is None and drawn is None:
            return None
        full = self.rows.get("full")
        steps = (speed or drawn)["parameters"]["steps"]
        whole = full["parameters"]["steps"] if full else steps
        return Method(name, speed, drawn, self.qualities.get(of), (steps, whole))

    def full(self) -> Method | None:
        """The full network, timed as the fastest plain network (the baseline of speed-ups)."""
        fastest = next((row["fastest_plain"] for row in self.speed.values()), "full")
        steps = self.rows["full"]["parameters"]["steps"] if "full" in self.rows else None
        return self.method(f"full network, {steps} steps" if steps else "full network", fastest)

    def threshold(self) -> str | None:
        """The middle one of the settings that were both timed and judged, or, without any, of all settings."""
        sets = [
            {row["parameters"]["setting"] for row in rows.values() if row["variant"] == "early exit"}
            for rows in (self.speed, self.drawn)
        ]
        found = sorted(sets[0] & sets[1] or sets[0] | sets[1], key=lambda setting: float(setting.partition(",")[0]))
        return found[len(found) // 2] if found else None

    def of_setting(self, variant: str, setting: str, name: str) -> Method | None:
        own = (
            key
            for key, row in self.rows.items()
            if (row["variant"], row["parameters"]["setting"]) == (variant, setting)
        )
        key = next(own, None)
        return key and self.method(name, key)

    def fewer_steps(self, early: Method | None) -> Method | None:
        """The number of steps nearest to early exit in speed, or in work if nothing was timed."""
        found = []
        for key, row in self.rows.items():
            if row["variant"] == "fewer steps":
                found.append(self.method(f"fewer steps, {row['parameters']['steps']}", key))
        if not found or early is None:
            return found[0] if found else None
        timed = [method for method in found if method.speed] if early.speed else []
        if timed:
            return min(timed, key=lambda method: abs(math.log(method.speed["speedup"] / early.speed["speedup"])))
        return min(found, key=lambda method: abs(method.blocks - early.blocks))


def section(rows: Sequence[Row]) -> Section | None:
    found = Digits.of(rows)
    overhead = cost_of_scoring(rows)
    if not found.rows:
        return Section(overhead, overhead[0]) if overhead else None
    setting = found.threshold()
    early = fixed = None
    if setting is not None:
        early = found.of_setting("early exit", setting, f"early exit, threshold {setting.partition(',')[0]}")
        fixed = found.of_setting("fixed depth", setting, "fixed depth, as many blocks")
    methods = [found.full(), found.fewer_steps(early), early, fixed]
    body = [method.cells() for method in methods if method]
    if not body:
        return None
    return Section([*columns(HEADER, body), *meaning(*methods)], brief(early), overhead)


def meaning(full: Method | None, fewer: Method | None, early: Method | None, fixed: Method | None) -> list[str]:
    """Whether early exit is better or worse than each of the others, by the intervals."""
    if early is None:
        return []
    compared = []
    for name, other in (
        ("the full network", full),
        (f"{fewer.steps[0]} steps" if fewer else "", fewer),
        ("a fixed depth", fixed),
    ):
        if words := other and against(early, other, other is full):
            compared.append(f"against {name}: {words}")
    if not compared:
        return []
    text = f"Early exit {'; '.join(compared)}."
    if early.quality:
        runs = f"{early.quality.runs} runs of " if early.quality.runs > 1 else ""
        text += f" Images by Fréchet distance, {runs}{early.quality.samples} samples."
    if "undecided" in text:
        text += " Undecided: intervals overlap."
    return sentence(text)


def against(early: Method, other: Method, full: bool) -> str:
    words = [judged_speed(early.speed, other.speed)] if early.speed and other.speed else []
    theirs = FULL if full else other.over_full
    if early.over_full and theirs:
        judged = BETTER[order(early.over_full, theirs)]
        words.append("images undecided" if judged == "undecided" else f"{judged} images")
    return ", ".join(words)


def brief(early: Method | None) -> str:
    if early is None:
        return "Digits: no early exit was measured."
    found = [times_as_fast(early.speed)] if early.speed else []
    if early.over_full:
        found.append(f"{early.over_full.value:.3f} times the Fréchet distance")
    return f"Digits, early exit against the full network: {', '.join(found)}."


def cost_of_scoring(rows: Sequence[Row]) -> list[str]:
    found = [
        row for row in on_most_threads(select(rows, SUITE, "overhead")) if row["variant"] == "engine, nobody leaves"
    ]
    found.sort(key=lambda row: row["dtype"] != "float32")  # float32 first: no CPU has to emulate it
    if not found:
        return []
    mark = ", busy" if busy(found[0]) else ""
    cost = percent(found[0]["overhead"], 1, "+")
    return sentence(f"Digits, forward pass without exits: {cost} over the fastest plain network{mark}.")
