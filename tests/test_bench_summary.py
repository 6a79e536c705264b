"""What a run of the benchmarks says in the end: the summary on stdout, and report.html beside the rows."""

import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from adadiff.metrics.intervals import Interval
from benchmarks import __main__ as run
from benchmarks import rows
from benchmarks.baselines import servers
from benchmarks.report import cells, html, sections, tables
from benchmarks.report.summary import LINES, summary
from benchmarks.rows import Row

RESULTS = rows.ROOT / "benchmarks" / "results"
FILES = {path.stem: rows.read(path) for path in sorted(RESULTS.glob("*.jsonl"))}
FOLDER = Path("out")
MACHINE = {"cpu": "A CPU", "cores": 2, "ram_gib": 8.0, "capability": "AVX2", "bfloat16": False, "system": "Linux"}


def row(suite: str, kind: str, variant: str, parameters: dict, **results: object) -> Row:
    return {
        "suite": suite,
        "kind": kind,
        "variant": variant,
        "parameters": parameters,
        "dtype": "float32",
        "threads": 2,
        "machine": MACHINE,
        "versions": {"torch": "2.12"},
        "commit": "a commit",
        "date": "2026-01-01T00:00:00+00:00",
        **results,
    }


def timed(seconds: float, aa_ratio: float = 1.01) -> dict[str, object]:
    spread = {"median": seconds, "p20": seconds * 0.99, "p80": seconds * 1.01, "min": seconds * 0.98, "n": 5}
    return {"seconds": spread, "aa_ratio": aa_ratio, "usable": abs(aa_ratio - 1) <= 0.03}


SETTINGS = {"full": None, "fewer steps": 12, "early exit": "0.135,first=3", "fixed depth": "0.135,first=3"}
SECONDS = {"full": 2.0, "fewer steps": 1.1, "early exit": 1.25, "fixed depth": 1.05}
RATIOS = {"fewer steps": (1.1, 1.05, 1.15), "early exit": (1.04, 1.02, 1.06), "fixed depth": (0.99, 0.97, 1.03)}


def digits_speed(seconds: dict[str, float] = SECONDS, aa_ratio: float = 1.01) -> list[Row]:
    made = []
    for variant, taken in seconds.items():
        setting = SETTINGS[variant]
        parameters = {"setting": setting, "steps": setting if variant == "fewer steps" else 20, "samples": 256}
        results = {"images_per_second": 256 / taken, "speedup": seconds["full"] / taken, "fastest_plain": "full"}
        if variant in ("early exit", "fixed depth"):
            results |= {"blocks": 610, "blocks_full": 1000, "mean_exit_layer": 7.9}
        made.append(row("digits", "speed", variant, parameters, **timed(taken, aa_ratio), **results))
    return made


def digits_quality(ratios: dict[str, tuple[float, float, float]] = RATIOS, samples: int = 200) -> list[Row]:
    made = []
    for variant, setting in SETTINGS.items():
        steps = setting if variant == "fewer steps" else 20
        parameters = {"setting": setting, "steps": steps, "samples": samples, "run": 0, "checkpoints": ["a", "b"]}
        results = {"frechet": 2.0, "frechet_low": 1.9, "frechet_high": 2.1, "accuracy": 0.9, "psnr_median": None}
        share = 0.61 if variant in ("early exit", "fixed depth") else 1.0
        results |= {"mean_exit_layer": 13 * share, "blocks_share": share, "macs_share": share}
        if variant in ratios:
            results["frechet_over_full"] = dict(zip(("value", "low", "high"), ratios[variant], strict=True))
        if variant == "early exit":
            results["exit_histogram"] = [[0] * 6 + [samples] + [0] * 6] * 20
        made.append(row("digits", "quality", variant, parameters, **results))
    return made


def network(batch: int, spread: float, nobody: float, aa_ratio: float = 1.01, plain: float = 1.0) -> list[Row]:
    parameters = {"preset": "cifar10_uvit_small", "batch": batch}
    common = {"fastest_plain": "plain, one batch", "evaluations_per_second": 1.0}
    first = {**timed(plain, aa_ratio), **common, "speedup": 1.0}
    made = [row("network", "baseline", "plain, one batch", parameters, **first)]
    for variant, taken, blocks in (("nobody leaves", nobody, 104), ("spread", spread, 64)):
        results = {
            **common,
            "speedup": plain / taken,
            "mean_exit_layer": blocks / 8,
            "blocks": blocks,
            "blocks_full": 104,
            "macs": blocks,
            "macs_full": 104,
            "share_of_attainable": 0.97,
            "share_of_flop_ideal": 0.96,
            "rows_moved": 10,
            "peak_bytes": 1,
            "peak_bytes_plain": 2,
        }
        made.append(row("network", "pattern", variant, parameters, **timed(taken, aa_ratio), **results))
    return made


DEFAULT = [*digits_speed(), *digits_quality(), *network(8, 0.62, 1.002), *network(32, 0.58, 1.2)]


def unusable(found: Sequence[Row]) -> list[Row]:
    return [{**row, "aa_ratio": 0.75, "usable": False} if "usable" in row else row for row in found]


def told(found: Sequence[Row], folder: Path = FOLDER) -> list[str]:
    """The summary, which always keeps to its size."""
    lines = summary(found, folder)
    assert 0 < len(lines) <= LINES
    assert max(map(len, lines)) <= sections.WIDTH
    assert lines[-1].startswith("Report: ")
    return lines


def line_of(lines: Sequence[str], start: str) -> list[str]:
    """The columns of the one line that begins so."""
    (line,) = (line for line in lines if line.startswith(start))
    return line[len(start) :].split()


CASES: dict[str, list[Row]] = {
    "empty": [],
    **FILES,
    **{f"{name}, busy": unusable(found) for name, found in FILES.items()},
    "all": [row for found in FILES.values() for row in found],
    "all, reversed": [row for found in reversed(FILES.values()) for row in found],
    "default": DEFAULT,
    "default, busy": unusable(DEFAULT),
    "quick": [*digits_speed(), *digits_quality(), *network(4, 0.62, 1.0)],
    "stopped after a row": digits_speed()[:1],
    "stopped before the fastest": [{**row, "fastest_plain": "full, batches of 64"} for row in digits_speed()[:1]],
    "a suite that is new": [row("new", "kind", "variant", {})],
    "long name": [{**row, "machine": {**MACHINE, "cpu": "Very long " * 12}} for row in DEFAULT],
}


@pytest.mark.parametrize("name", CASES)
def test_it_fits_on_a_screen(name: str) -> None:
    lines = told(CASES[name])
    assert "…" not in "".join(lines)
    far = Path("/", *["folder"] * 30)
    assert told(CASES[name], far)[-1].endswith("folder/report.html")


@pytest.mark.parametrize("name", ["default", "quick"])
def test_both_suites_are_told_at_length(name: str) -> None:
    """Whatever intervals decide, which takes sentences of different length."""
    for aa_ratio, width in ((1.01, 0.0), (1.01, 0.5), (0.7, 0.5)):
        wide = dict.fromkeys(RATIOS, (1.0, 1 - width, 1 + width))
        same = dict.fromkeys(SECONDS, 1.0)
        given = [*digits_speed(same, aa_ratio), *digits_quality(wide, 10000)]
        given += [row for row in CASES[name] if row["suite"] == "network"]
        text = "\n".join(told(given))
        for words in ("full network, 20 steps", "fewer steps, 12", "early exit", "fixed depth", "batch", "Exits save"):
            assert words in text


def test_the_first_line_is_the_machine_and_the_second_how_quiet_it_was() -> None:
    assert told(DEFAULT)[:2] == [
        "A CPU, 2 cores, 2 threads, torch 2.12, float32",
        "The same call measured twice differed by at most 1.0 %.",
    ]
    busy = told([*DEFAULT, *network(64, 0.5, 1.0, aa_ratio=1.16)])[1]
    assert "busy" in busy
    assert "16.0 %" in busy
    assert "run again" in told(unusable(DEFAULT))[1]
    assert told(digits_quality())[1].startswith("Nothing was timed")


def test_numbers_of_the_digits_are_those_of_their_rows() -> None:
    lines = told(DEFAULT)
    assert line_of(lines, "full network, 20 steps") == ["128.0", "1.00", "100", "%"]
    fewer, early, fixed = (
        line_of(lines, start)
        for start in ("fewer steps, 12", "early exit, threshold 0.135", "fixed depth, as many blocks")
    )
    assert fewer == [f"{256 / 1.1:.1f}", f"{2 / 1.1:.2f}", "60", "%", "1.100", "(1.050", "to", "1.150)"]
    assert early == [f"{256 / 1.25:.1f}", "1.60", "61", "%", "1.040", "(1.020", "to", "1.060)"]
    assert fixed == [f"{256 / 1.05:.1f}", f"{2 / 1.05:.2f}", "61", "%", "0.990", "(0.970", "to", "1.030)"]


def test_the_full_network_is_timed_as_fast_as_it_gets() -> None:
    """In the batches over which speed-ups are."""
    given = [{**row, "fastest_plain": "full, batches of 64"} for row in digits_speed()]
    batched = {**given[0]["parameters"], "setting": 64}
    given.append({**given[0], "variant": "full, batches of", "parameters": batched, "images_per_second": 141.4})
    given[0]["speedup"] = 0.9
    lines = told([*given, *digits_quality()])
    assert line_of(lines, "full network, 20 steps") == ["141.4", "1.00", "100", "%"]


def test_numbers_of_the_network_are_those_of_its_rows() -> None:
    lines = told(DEFAULT)
    assert line_of(lines, "batch 8, random weights") == [f"{1 / 0.62:.2f}", "97", "%", "+0.2", "%"]
    assert line_of(lines, "batch 32, random weights") == [f"{1 / 0.58:.2f}", "97", "%", "+20.0", "%"]
    assert "Exits save time in 2 of 2 comparisons; without exits the engine costs time in 1 of 2." in lines


def model_rows(preset: str, batch: int, seconds: dict[str, float], aa_ratio: float = 1.0) -> list[Row]:
    parameters = {"preset": preset, "batch": batch}
    known = {"device": "cpu", "fastest_plain": "plain, eager", "macs": 60, "macs_full": 100, "peak_bytes": 2**20}
    return [
        row(
            "models", "evaluation", name, parameters, **timed(s, aa_ratio), **known, speedup=seconds["plain, eager"] / s
        )
        for name, s in seconds.items()
    ]


def test_numbers_of_the_models_are_those_of_their_rows() -> None:
    given = []
    for preset, early, aa_ratio in (("small", 1.3, 1.0), ("middle", 0.7, 1.0), ("large", 0.6, 1.3)):
        seconds = {"plain, eager": 1.0, "nobody leaves": 1.0 + early / 10, "two-phase": early}
        given += model_rows(preset, 8, seconds, aa_ratio)
    lines = told(given)
    assert line_of(lines, "batch 8, every other lane exits") == [f"{1 / 1.3:.2f}", "small", "1.67", "large", "busy"]
    assert line_of(lines, "batch 8, no exits") == [f"{1 / 1.13:.2f}", "small", f"{1 / 1.06:.2f}", "large", "busy"]
    assert "Batch 8: exits save time in 1 of 2 networks; without exits the engine costs time in 2 of 2." in lines
    assert line_of(told(given[:3]), "batch 8, every other lane exits") == [f"{1 / 1.3:.2f}"]


def server_rows() -> list[Row]:
    given = []
    for capacity in (32, 8):
        for name, seconds, depth in ((servers.PLAIN, 2.0, 13.0), (servers.MEAN, 1.2, 8.0), (servers.OURS, 1.0, 7.5)):
            parameters = {"preset": "cifar10_uvit_small", "capacity": capacity, "steps": 50}
            results = {"images_per_second": capacity / seconds / 50, "speedup": 2.0 / seconds, "mean_exit_layer": depth}
            results |= {"outside_network": 0.01, "rows_per_layer": [1.0]}
            given.append(row("serving", "throughput", name, parameters, **timed(seconds), **results))
    for name, p95 in ((servers.LOCK_STEP, 3.21), (servers.OURS, 1.23)):
        for model, clock, aa_ratio in (("digits", "real", 1.0), ("imagenet256_uvit_large", "virtual", 1.1)):
            parameters = {"model": model, "clock": clock, "capacity": 32, "requests": 64, "load": 0.8}
            results = {
                "p95": p95,
                "p99": 9.0,
                "images_per_second": 5.0,
                "mean_exit_layer": 8.0,
                "rows_per_layer": [1.0],
            }
            given.append(row("serving", "latency", name, parameters, **timed(1.0, aa_ratio), **results))
    return given


def test_numbers_of_serving_are_those_of_the_largest_server() -> None:
    lines = told(server_rows())
    plain = line_of(lines, "plain network, continuous batching")
    assert plain == ["0.320", "1.00", "100", "%"]
    assert line_of(lines, "one exit decision for the batch") == ["0.533", "1.67", "62", "%"]
    ours, waiting = (line.split() for line in lines if line.startswith("early exit, each image by itself"))
    assert ours[6:] == ["0.640", "2.00", "58", "%"]
    assert waiting[6:] == ["1.23", "s", "1.23", "s", "busy"]
    assert line_of(lines, "plain network, batches in lock step") == ["3.21", "s", "3.21", "s", "busy"]
    text = " ".join(lines)
    assert "against the plain network: faster; against one decision for the batch: faster" in text


def test_numbers_of_the_headline_are_those_of_its_rows() -> None:
    parameters = {"model": "canvases", "steps": 20, "samples": 64}
    full = row("headline", "speed", "full network", parameters, **timed(1.5), way="loop", speedup=1.0)
    results = {"way": "compiled engine", "speedup": 1.7, "mean_exit_layer": 7.0, "macs_share": 0.55}
    early = row("headline", "speed", "early exit", parameters, **timed(0.88), **results)
    reuse = row(
        "headline", "speed", "reuse", parameters, **timed(0.8), **{**results, "speedup": 1.9, "macs_share": 0.5}
    )
    lines = told([full, early, reuse])
    assert line_of(lines, "reuse, compiled engine") == ["0.80", "1.90", "50", "%"]
    assert any(line.startswith("64 canvases, 20 steps") for line in lines)
    assert line_of(lines, "full network, loop") == ["1.50", "1.00", "100", "%"]
    assert line_of(lines, "early exit, compiled engine") == ["0.88", "1.70", "55", "%"]
    assert "Early exit against the full network: faster." in lines


def _told_by(table: cells.Table) -> str:
    """What a table of the comparison shows, as "ours by budget, squared error"."""
    return f"{table.header[0].partition(', ')[2]}, {table.header[5]}" if len(table.header) == 8 else ""


@pytest.mark.parametrize("name", [name for name, found in FILES.items() if cells.select(found, "quality", "quality")])
def test_numbers_of_equal_seconds_are_those_of_their_tables(name: str) -> None:
    lines = told(FILES[name])
    by_frechet, by_error = (
        next(table for table in tables.all_tables(FILES[name]) if f"ours by budget, {measure}" in _told_by(table))
        for measure in ("Fréchet distance", "squared error")
    )
    verdicts = {"below": "better", "above": "worse", "on it": "equal"}
    for one, other in zip(by_frechet.body, by_error.body, strict=True):
        budget = f"{float(one[0]) * 100:.0f} % of the work" if one[0][0].isdigit() else one[0]
        wanted = [word for line in (one, other) for word in (*line[6].split(), verdicts.get(line[7], line[7]))]
        assert [word for word in line_of(lines, budget) if word != "busy"] == wanted


def test_the_middle_threshold_and_the_steps_of_its_speed_are_shown() -> None:
    """Of four thresholds the third, as in the suite; of two numbers of steps that whose speed is nearer."""
    given = digits_speed()
    for theta, taken in (("0.07", 1.6), ("0.115", 1.4), ("0.18,first=3", 0.9)):
        early = given[2]
        given.append({**early, **timed(taken), "parameters": {**early["parameters"], "setting": theta}})
    fewer = given[1]
    given.append(
        {**fewer, **timed(0.6), "speedup": 2 / 0.6, "parameters": {**fewer["parameters"], "setting": 8, "steps": 8}}
    )
    text = "\n".join(told(given))
    assert "early exit, threshold 0.135" in text
    assert "fewer steps, 12" in text
    assert "fewer steps, 8" not in text


LOW, HIGH, BETWEEN = (0.9, 0.88, 0.92), (1.2, 1.15, 1.25), (1.0, 0.87, 1.3)


@pytest.mark.parametrize(
    ("early", "fewer", "words"),
    [
        (LOW, HIGH, ["against the full network: faster, better images", "against 12 steps: slower, better images"]),
        (HIGH, LOW, ["against the full network: faster, worse images", "against 12 steps: slower, worse images"]),
        (BETWEEN, LOW, ["against the full network: faster, images undecided", "against 12 steps: slower, images unde"]),
    ],
)
def test_what_intervals_decide_is_said_and_nothing_else(early: tuple, fewer: tuple, words: list[str]) -> None:
    ratios = {"early exit": early, "fewer steps": fewer, "fixed depth": BETWEEN}
    text = " ".join(told([*digits_speed(), *digits_quality(ratios)]))
    for one in words:
        assert one in text
    assert "against a fixed depth: slower, images undecided" in text
    assert "200 samples" in text


def test_speeds_are_told_apart_only_by_more_than_the_noise() -> None:
    def taking(median: float, p20: float, p80: float, speedup: float | None = None) -> Row:
        return {"seconds": {"median": median, "p20": p20, "p80": p80}, "speedup": speedup or 1 / median}

    one = taking(1.0, 0.9, 1.1)
    for median, p20, p80, wanted in ((1.3, 1.2, 1.4, -1), (0.7, 0.6, 0.8, 1), (1.3, 1.05, 1.4, 0), (0.7, 0.6, 0.95, 0)):
        assert sections.order_of_seconds(one, taking(median, p20, p80)) == wanted
    assert sections.order_of_seconds(taking(1.0, 1.0, 1.0), taking(1.02, 1.02, 1.02)) == 0  # of a round or two
    # the machine slowed down: round by round they were alike, or the other way round
    assert sections.order_of_seconds(one, taking(1.3, 1.2, 1.4, speedup=0.99)) == 0
    assert sections.order_of_seconds(one, taking(1.3, 1.2, 1.4, speedup=1.1)) == 0
    assert sections.order(Interval(1.0, 0.9, 1.1), Interval(1.2, 1.1, 1.3)) == 0


def test_busy_numbers_are_marked_and_decide_nothing() -> None:
    lines = told(unusable(DEFAULT))
    for start in ("full network", "fewer steps", "early exit, ", "fixed depth", "batch 8", "batch 32"):
        assert "busy" in line_of(lines, start)
    text = " ".join(lines)
    assert sections.busy(None, DEFAULT[0], {"usable": False}) == "busy"
    assert sections.busy(None, DEFAULT[0]) == ""
    assert "speed unclear (busy)" in text
    assert not {"faster,", "slower,"} & set(text.split())
    assert "Not enough was measured undisturbed" in text


def test_what_another_machine_timed_is_left_out() -> None:
    elsewhere = [{**row, "machine": {**MACHINE, "cpu": "Another"}} for row in digits_speed()]
    text = "\n".join(told([*elsewhere, *network(8, 0.62, 1.0)]))
    assert "A CPU" in text
    assert "Digits" not in text


class Page(HTMLParser):
    """Tags that are open, texts, and what would be fetched."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.cells[-1] += data


def test_the_page_holds_every_table_and_picture_once(tmp_path: Path) -> None:
    found = [row for stem in FILES for row in FILES[stem]]
    pictures = []
    for name in ("images", "network", "equal-seconds-digits", "reliability-canvases", "unknown"):
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG " + name.encode())
        pictures.append(tmp_path / f"{name}.png")
    text = html.page(["a line"], found, pictures)
    page = Page(text)
    made = tables.all_tables(found)
    assert page.tags.count("table") == len(made)
    wanted = sorted(cell for table in made for line in (table.header, *table.body) for cell in line)
    assert sorted(page.cells) == wanted
    assert page.tags.count("img") == len(page.sources) == len(set(page.sources)) == len(pictures)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert text.count("<pre>a line</pre>") == 1


def test_the_page_escapes_what_rows_hold() -> None:
    evil = [{**row, "variant": "<script>&", "machine": {**MACHINE, "cpu": "<b>"}} for row in network(8, 0.5, 1.0)]
    page = Page(text := html.page(["1 < 2 & 3"], evil, []))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "<script>&" in page.cells
    assert "1 &lt; 2 &amp; 3" in text


def started(monkeypatch: pytest.MonkeyPatch, folder: Path, measure: Callable[[rows.Rows], None], *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--suite", "network", "--out", str(folder), *argv])
    monkeypatch.setattr(run.network, "run", lambda file, settings: measure(file))
    run.main()


def write_network(file: rows.Rows) -> None:
    rows.say("network: batch 8")
    for made in network(8, 0.62, 1.0):
        known = {"suite", "kind", "variant", "parameters", "threads", "machine", "versions", "commit", "date"}
        results = {name: value for name, value in made.items() if name not in known}
        file.write(made["suite"], made["kind"], made["variant"], made["parameters"], **results)


def test_stdout_is_the_summary_and_progress_goes_to_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started(monkeypatch, tmp_path, write_network)
    printed = capsys.readouterr()
    found = rows.read(tmp_path / "rows.jsonl")
    assert printed.out.splitlines() == summary(found, tmp_path)
    assert f"torch {torch.__version__}" in printed.out.splitlines()[0]
    stages = [line for line in printed.err.splitlines() if line]
    assert all(line[0] == "[" and line[1:3].isdecimal() and line[3] == ":" for line in stages)
    assert sum("network: batch 8" in line for line in stages) == 1
    (table,) = tables.all_tables(found)
    assert (tmp_path / "tables.txt").read_text() == tables.plain(table) + "\n"
    page = (tmp_path / "report.html").read_text()
    assert Page(page).tags.count("img") == 1
    assert printed.out.splitlines()[0] in page
    assert "Report: " not in page  # which is where it lies
    assert not list(tmp_path.glob("*.part"))


def test_an_interrupted_run_says_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(file: rows.Rows) -> None:
        write_network(file)
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="interrupted"):
        started(monkeypatch, tmp_path, interrupted)
    assert "batch 8, random weights" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()
